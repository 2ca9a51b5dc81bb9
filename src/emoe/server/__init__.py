"""HTTP: OpenAI's API, metrics, a dashboard."""
