"""Codecs: how one expert is encoded at rest and in its slot. `formats` names them, `store` keeps encoded experts."""
