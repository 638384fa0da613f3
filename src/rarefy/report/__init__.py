"""What a run tells its user: records of its layers, tables, the model card."""
