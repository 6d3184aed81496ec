"""What comes into a run: data, conversations, chat templates, the model folder; found, checked, rendered."""
