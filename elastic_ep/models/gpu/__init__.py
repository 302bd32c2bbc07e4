"""The same models on a GPU: row-invariant kernels, keys and values and expert slots in device memory, tables at fixed addresses."""
