"""The engines' sides that pass messages: clients in this process, or in actors of Ray."""
