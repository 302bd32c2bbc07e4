// xxh3_64 (seed 0) of slots in GPU memory, the very number that the host computes: github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
// The sums of a block of 1024 bytes do not depend on each other, only the scrambling between blocks does: so all blocks are summed at
// once, and one warp per slot then goes over the sums.
#include <cstdint>
#include <cuda_runtime.h>

typedef unsigned long long u64;
typedef unsigned int u32;

namespace {

constexpr int kLanes = 8, kStripe = 64, kBlock = 1024, kStripes = kBlock / kStripe, kSecret = 192;
constexpr int kChunk = 128;  // blocks whose sums wait in shared memory
constexpr u64 P32_1 = 0x9E3779B1ull, P32_2 = 0x85EBCA77ull, P32_3 = 0xC2B2AE3Dull;
constexpr u64 P64_1 = 0x9E3779B185EBCA87ull, P64_2 = 0xC2B2AE3D27D4EB4Full, P64_3 = 0x165667B19E3779F9ull;
constexpr u64 P64_4 = 0x85EBCA77C2B2AE63ull, P64_5 = 0x27D4EB2F165667C5ull;

// The specification's default secret, as little-endian words.
__constant__ u64 secret_words[kSecret / 8] = {
    0xBE4BA423396CFEB8ull, 0x1CAD21F72C81017Cull, 0xDB979083E96DD4DEull, 0x1F67B3B7A4A44072ull,
    0x78E5C0CC4EE679CBull, 0x2172FFCC7DD05A82ull, 0x8E2443F7744608B8ull, 0x4C263A81E69035E0ull,
    0xCB00C391BB52283Cull, 0xA32E531B8B65D088ull, 0x4EF90DA297486471ull, 0xD8ACDEA946EF1938ull,
    0x3F349CE33F76FAA8ull, 0x1D4F0BC7C7BBDCF9ull, 0x3159B4CD4BE0518Aull, 0x647378D9C97E9FC8ull,
    0xC3EBD33483ACC5EAull, 0xEB6313FAFFA081C5ull, 0x49DAF0B751DD0D17ull, 0x9E68D429265516D3ull,
    0xFCA1477D58BE162Bull, 0xCE31D07AD1B8F88Full, 0x280416958F3ACB45ull, 0x7E404BBBCAFBD7AFull,
};

__device__ u64 secret_at(int offset) {
    int word = offset / 8, bits = 8 * (offset % 8);
    return bits ? secret_words[word] >> bits | secret_words[word + 1] << (64 - bits) : secret_words[word];
}

// What one stripe adds to lane `lane`.
__device__ u64 stripe(const u64 *data, int lane, u64 key) {
    u64 mixed = data[lane] ^ key;
    return data[lane ^ 1] + (mixed & 0xFFFFFFFFull) * (mixed >> 32);
}

__global__ void sum_blocks(const u64 *data, u64 *sums, long long blocks) {
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= blocks * kLanes) return;
    int lane = index % kLanes;
    const u64 *block = data + index / kLanes * (kBlock / 8);
    u64 sum = 0;
    for (int s = 0; s < kStripes; s++) sum += stripe(block + s * kLanes, lane, secret_at(8 * s + 8 * lane));
    sums[index] = sum;
}

__device__ u64 fold(u64 a, u64 b) { return (a * b) ^ __umul64hi(a, b); }

// One warp. num_bytes is a multiple of 8 and above 240.
__global__ void finish(const u64 *data, const u64 *sums, long long num_bytes, u64 *digest) {
    __shared__ u64 waiting[2][kChunk * kLanes];
    __shared__ u64 last[kLanes];
    const u64 start[kLanes] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    long long blocks = (num_bytes - 1) / kBlock;
    int me = threadIdx.x, lane = me % kLanes;
    u64 acc = start[lane];
    u64 scramble = secret_at(kSecret - kStripe + 8 * lane);
    u64 ahead[kChunk * kLanes / 32];
    for (int i = 0; i < kChunk * kLanes / 32; i++) {
        long long at = i * 32 + me;
        ahead[i] = at < blocks * kLanes ? sums[at] : 0;
    }
    int turn = 0;
    for (long long first = 0; first < blocks; first += kChunk, turn ^= 1) {
        for (int i = 0; i < kChunk * kLanes / 32; i++) waiting[turn][i * 32 + me] = ahead[i];
        __syncwarp();
        for (int i = 0; i < kChunk * kLanes / 32; i++) {
            long long at = (first + kChunk) * kLanes + i * 32 + me;
            ahead[i] = at < blocks * kLanes ? sums[at] : 0;
        }
        int count = blocks - first < kChunk ? (int)(blocks - first) : kChunk;
#pragma unroll 16
        for (int b = 0; b < count; b++) {
            acc += waiting[turn][b * kLanes + lane];
            acc = (acc ^ (acc >> 47) ^ scramble) * P32_1;
        }
    }
    const u64 *rest = data + blocks * (kBlock / 8);
    int stripes = (int)((num_bytes - 1 - blocks * kBlock) / kStripe);
    for (int s = 0; s < stripes; s++) acc += stripe(rest + s * kLanes, lane, secret_at(8 * s + 8 * lane));
    acc += stripe(data + num_bytes / 8 - kLanes, lane, secret_at(kSecret - kStripe - 7 + 8 * lane));
    if (me < kLanes) last[lane] = acc;
    __syncwarp();
    if (me == 0) {
        u64 result = (u64)num_bytes * P64_1;
        for (int i = 0; i < 4; i++) result += fold(last[2 * i] ^ secret_at(11 + 16 * i), last[2 * i + 1] ^ secret_at(19 + 16 * i));
        result ^= result >> 37;
        result *= 0x165667919E3779F9ull;
        *digest = result ^ (result >> 32);
    }
}

}  // namespace

extern "C" {

const char *eep_digest_error(int error) { return cudaGetErrorString((cudaError_t)error); }

// Enqueue: digest (in pinned or device memory) of data; sums has room for num_bytes / 128 words.
int eep_digest(const void *data, long long num_bytes, void *sums, void *digest, void *stream) {
    cudaStream_t on = (cudaStream_t)stream;
    long long blocks = (num_bytes - 1) / kBlock, threads = blocks * kLanes;
    if (threads) sum_blocks<<<(unsigned)((threads + 255) / 256), 256, 0, on>>>((const u64 *)data, (u64 *)sums, blocks);
    finish<<<1, 32, 0, on>>>((const u64 *)data, (const u64 *)sums, num_bytes, (u64 *)digest);
    return cudaGetLastError();
}
}
