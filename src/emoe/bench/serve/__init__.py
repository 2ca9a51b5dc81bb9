"""`emoe bench serve`: load on a server that speaks OpenAI's HTTP, and what its clients see of it."""
