// What Python calls (library.py). Every function returns a cudaError_t.
#include "combine.cuh"
#include "common.cuh"
#include "dispatch.cuh"

__global__ void set_clock_kernel(u64 *clock, u64 epoch, u64 step) { clock[0] = epoch, clock[1] = step; }

static int shared_bytes(const Args *a) {
    size_t plan = sizeof(int) * (a->ranks * a->experts + a->ranks + 1), numbering = Numbering::bytes(*a);
    return (int)(plan > numbering ? plan : numbering);
}

template <class Kernel> static int launch(Kernel kernel, const Args *a, int blocks, int shared, cudaStream_t stream) {
    kernel<<<blocks, THREADS, shared, stream>>>(*a);
    return cudaGetLastError();
}

extern "C" {
int eep_alloc(size_t bytes, void **p) {
    int error = cudaMalloc(p, bytes);
    return error ? error : cudaMemset(*p, 0, bytes);
}
int eep_free(void *p) { return cudaFree(p); }
int eep_host_alloc(size_t bytes, void **p) { return cudaHostAlloc(p, bytes, cudaHostAllocMapped | cudaHostAllocPortable); }
int eep_host_free(void *p) { return cudaFreeHost(p); }
int eep_export(void *p, char *handle) { return cudaIpcGetMemHandle((cudaIpcMemHandle_t *)handle, p); }
int eep_open(const char *handle, void **p) {
    return cudaIpcOpenMemHandle(p, *(const cudaIpcMemHandle_t *)handle, cudaIpcMemLazyEnablePeerAccess);
}
int eep_close(void *p) { return cudaIpcCloseMemHandle(p); }
const char *eep_error(int error) { return cudaGetErrorString((cudaError_t)error); }
int eep_args_bytes(void) { return (int)sizeof(Args); }

// Load every kernel now, by a launch that does nothing: loading one later could wait for a kernel that waits, or spoil a graph's capture.
int eep_prepare(const Args *largest, cudaStream_t stream) {
    const void *all[] = {(const void *)dispatch_kernel<uint4>,          (const void *)dispatch_kernel<unsigned short>,
                         (const void *)combine_kernel<uint4, true>,     (const void *)combine_kernel<uint4, false>,
                         (const void *)combine_kernel<unsigned short, true>, (const void *)combine_kernel<unsigned, false>,
                         (const void *)set_clock_kernel};
    for (const void *kernel : all) {
        cudaFuncAttributes attributes;
        int error = cudaFuncGetAttributes(&attributes, kernel);
        if (error) return error;
    }
    // the limit is the kernel's, for all ranks in this process: it may only grow. Up to 48 KiB need no leave, static memory included.
    static int limit = 47 << 10;
    if (shared_bytes(largest) > limit) {
        limit = shared_bytes(largest);
        for (int i = 0; i < 2; i++) {
            int error = cudaFuncSetAttribute(all[i], cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
            if (error) return error;
        }
    }
    Args nothing = *largest;
    nothing.parts = 0;
    const Args *a = &nothing;
    int error = launch(dispatch_kernel<uint4>, a, 1, shared_bytes(a), stream);
    if (!error) error = launch(dispatch_kernel<unsigned short>, a, 1, shared_bytes(a), stream);
    if (!error) error = launch(combine_kernel<uint4, true>, a, 1, 0, stream);
    if (!error) error = launch(combine_kernel<uint4, false>, a, 1, 0, stream);
    if (!error) error = launch(combine_kernel<unsigned short, true>, a, 1, 0, stream);
    if (!error) error = launch(combine_kernel<unsigned, false>, a, 1, 0, stream);
    return error;
}
int eep_set_clock(u64 *clock, u64 epoch, u64 step, cudaStream_t stream) {
    set_clock_kernel<<<1, 1, 0, stream>>>(clock, epoch, step);
    return cudaGetLastError();
}
int eep_dispatch(const Args *a, int blocks, cudaStream_t stream) {
    return a->row_bytes % 16 ? launch(dispatch_kernel<unsigned short>, a, blocks, shared_bytes(a), stream)
                             : launch(dispatch_kernel<uint4>, a, blocks, shared_bytes(a), stream);
}
int eep_combine(const Args *a, int blocks, cudaStream_t stream) {
    if (a->row_bytes % 16)
        return a->is_bf16 ? launch(combine_kernel<unsigned short, true>, a, blocks, 0, stream)
                          : launch(combine_kernel<unsigned, false>, a, blocks, 0, stream);
    return a->is_bf16 ? launch(combine_kernel<uint4, true>, a, blocks, 0, stream) : launch(combine_kernel<uint4, false>, a, blocks, 0, stream);
}
}
