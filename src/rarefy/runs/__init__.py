"""The application: one pruning run from its recipe to a verified folder, resumable at every block."""
