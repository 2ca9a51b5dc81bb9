"""What kind of work a prompt asks for, and what is known of each kind: the profile of a model (docs/profile.md)."""
