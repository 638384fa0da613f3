"""The mathematics of one layer: tensors in, tensors out; no modules, files, ranks or names."""
