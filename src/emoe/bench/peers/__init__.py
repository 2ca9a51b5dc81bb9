"""`emoe bench peers`: other engines beside emoe, on the same checkpoint, tokens, memory limit and threads."""
