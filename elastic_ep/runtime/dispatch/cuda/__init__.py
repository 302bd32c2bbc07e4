"""Dispatch and combine on GPUs of one node: peers' memory mapped by CUDA IPC, waits with a deadline and the mask inside the kernels.

`build` compiles `kernels.cu` on first use, `bindings` calls it, `region` lays out and maps memory, `tables` keeps routing on the device,
`dispatcher` is the backend. Importing any of them needs neither a GPU nor CUDA.
"""
