"""The opponent answers the prompts."""
