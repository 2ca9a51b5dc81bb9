"""What the model's routers chose, what they would choose among fewer experts, and records of both."""
