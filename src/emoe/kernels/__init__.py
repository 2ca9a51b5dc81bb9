"""How experts are computed: the arithmetic of one layer, over weights that lie in slots."""
