/* xxh3_64 (seed 0, more than 240 bytes: github.com/Cyan4973/xxHash, doc/xxhash_spec.md) of bytes on their way into memory: read from files in
   stretches, or from another process, and digested while they are in the cache, or copied past it. One call per expert, without the GIL.
   Called from digest.py with addresses as integers; the caller vouches for lengths and lifetimes. */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define STRIPE 64
#define STRIPES_PER_BLOCK 16
#define CHUNK (1 << 18) /* read, then digested: half of a core's own cache */
#define AHEAD 2048      /* bytes asked for in advance: the processor does not look past a page by itself */

static const uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
static const uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu, P64_3 = 0x165667B19E3779F9u;
static const uint64_t P64_4 = 0x85EBCA77C2B2AE63u, P64_5 = 0x27D4EB2F165667C5u;

/* the specification's default secret, as little-endian words */
static const uint64_t SECRET[24] = {
    0xBE4BA423396CFEB8u, 0x1CAD21F72C81017Cu, 0xDB979083E96DD4DEu, 0x1F67B3B7A4A44072u, 0x78E5C0CC4EE679CBu, 0x2172FFCC7DD05A82u,
    0x8E2443F7744608B8u, 0x4C263A81E69035E0u, 0xCB00C391BB52283Cu, 0xA32E531B8B65D088u, 0x4EF90DA297486471u, 0xD8ACDEA946EF1938u,
    0x3F349CE33F76FAA8u, 0x1D4F0BC7C7BBDCF9u, 0x3159B4CD4BE0518Au, 0x647378D9C97E9FC8u, 0xC3EBD33483ACC5EAu, 0xEB6313FAFFA081C5u,
    0x49DAF0B751DD0D17u, 0x9E68D429265516D3u, 0xFCA1477D58BE162Bu, 0xCE31D07AD1B8F88Fu, 0x280416958F3ACB45u, 0x7E404BBBCAFBD7AFu,
};

struct digest {
    uint64_t lanes[8];
    size_t stripe, stripes; /* how many are in, and are to be but the last */
};

static uint64_t word(const char *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static void begin(struct digest *d, size_t n) {
    *d = (struct digest){{P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1}, 0, (n - 1) / STRIPE};
}

static void stripe_in(uint64_t *lanes, const char *data, const char *secret) {
    for (int i = 0; i < 8; i++) {
        uint64_t value = word(data + 8 * i), mixed = value ^ word(secret + 8 * i);
        lanes[i ^ 1] += value;
        lanes[i] += (mixed & 0xFFFFFFFFu) * (mixed >> 32);
    }
}

static void scramble(uint64_t *lanes) {
    for (int i = 0; i < 8; i++) lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ SECRET[16 + i]) * P32_1;
}

/* Take the stripes before `limit` in, and copy them to `into`, if there is one. Each byte is read once, or what was copied could be another than
   what was digested: somebody may be writing there. */
static void stripes_in(struct digest *d, const char *data, char *into, size_t limit) {
    for (; d->stripe < limit; d->stripe++) {
        const char *at = data + d->stripe * STRIPE;
        if (into) at = memcpy(into + d->stripe * STRIPE, at, STRIPE);
        stripe_in(d->lanes, at, (const char *)(SECRET + d->stripe % STRIPES_PER_BLOCK));
        if (d->stripe % STRIPES_PER_BLOCK == STRIPES_PER_BLOCK - 1) scramble(d->lanes);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static inline __m256i mix(__m256i lanes, __m256i value, const uint64_t *secret) {
    __m256i mixed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)secret));
    lanes = _mm256_add_epi64(lanes, _mm256_shuffle_epi32(value, 0x4E)); /* of the neighbour lane */
    return _mm256_add_epi64(lanes, _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32)));
}

/* The same, for `into` aligned to 32 bytes: written past the cache, so that memory is not read before it is overwritten. */
__attribute__((target("avx2"))) static void stripes_in_avx2(struct digest *d, const char *data, char *into, size_t limit) {
    __m256i low = _mm256_loadu_si256((const __m256i *)d->lanes), high = _mm256_loadu_si256((const __m256i *)(d->lanes + 4));
    size_t s = d->stripe;
    for (; s < limit; s++) {
        const char *at = data + s * STRIPE;
        const uint64_t *secret = SECRET + s % STRIPES_PER_BLOCK;
        __m256i a = _mm256_loadu_si256((const __m256i *)at), b = _mm256_loadu_si256((const __m256i *)(at + 32));
        _mm_prefetch(at + AHEAD, _MM_HINT_T0);
        low = mix(low, a, secret);
        high = mix(high, b, secret + 4);
        if (into) {
            _mm256_stream_si256((__m256i *)(into + s * STRIPE), a);
            _mm256_stream_si256((__m256i *)(into + s * STRIPE + 32), b);
        }
        if (s % STRIPES_PER_BLOCK == STRIPES_PER_BLOCK - 1) {
            _mm256_storeu_si256((__m256i *)d->lanes, low);
            _mm256_storeu_si256((__m256i *)(d->lanes + 4), high);
            scramble(d->lanes);
            low = _mm256_loadu_si256((const __m256i *)d->lanes), high = _mm256_loadu_si256((const __m256i *)(d->lanes + 4));
        }
    }
    _mm256_storeu_si256((__m256i *)d->lanes, low);
    _mm256_storeu_si256((__m256i *)(d->lanes + 4), high);
    d->stripe = s;
    if (into) _mm_sfence();
}
#endif

/* Take bytes before `end` in, as far as whole stripes go. */
static void take(struct digest *d, const char *data, char *into, size_t end) {
    size_t limit = end / STRIPE < d->stripes ? end / STRIPE : d->stripes;
    if (limit <= d->stripe) return;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && (uintptr_t)into % 32 == 0) {
        stripes_in_avx2(d, data, into, limit);
        return;
    }
#endif
    stripes_in(d, data, into, limit);
}

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t end(struct digest *d, const char *data, size_t n) {
    const char *secret = (const char *)SECRET;
    take(d, data, NULL, n);
    stripe_in(d->lanes, data + n - STRIPE, secret + sizeof SECRET - STRIPE - 7);
    uint64_t sum = n * P64_1;
    for (int i = 0; i < 4; i++) sum += fold(d->lanes[2 * i] ^ word(secret + 11 + 16 * i), d->lanes[2 * i + 1] ^ word(secret + 19 + 16 * i));
    sum = (sum ^ sum >> 37) * 0x165667919E3779F9u;
    return sum ^ sum >> 32;
}

/* copy(into, source, num_bytes) -> digest. More than 240 bytes. */
static PyObject *copy(PyObject *self, PyObject *args) {
    unsigned long long into, source;
    Py_ssize_t n;
    if (!PyArg_ParseTuple(args, "KKn", &into, &source, &n)) return NULL;
    struct digest d;
    uint64_t result;
    Py_BEGIN_ALLOW_THREADS;
    char *to = (char *)(uintptr_t)into;
    const char *from = (const char *)(uintptr_t)source;
    begin(&d, n);
    take(&d, from, to, n);
    memcpy(to + d.stripe * STRIPE, from + d.stripe * STRIPE, n - d.stripe * STRIPE);
    result = end(&d, to, n);
    Py_END_ALLOW_THREADS;
    return PyLong_FromUnsignedLongLong(result);
}

/* read(address, num_bytes, stretches) -> (digest, -1, 0, 0), or of a read that failed (0, index, bytes that came, errno; 0: the file ended).
   stretches: (descriptor, offset in the file, begin in memory, count), 32 at most, ascending in memory. More than 240 bytes. */
static PyObject *read_stretches(PyObject *self, PyObject *args) {
    unsigned long long address;
    Py_ssize_t n, count;
    PyObject *given;
    struct stretch {
        int fd;
        long long offset;
        Py_ssize_t begin, count;
    } stretches[32];
    if (!PyArg_ParseTuple(args, "KnO!", &address, &n, &PyTuple_Type, &given)) return NULL;
    count = PyTuple_GET_SIZE(given);
    if (count > 32) return PyErr_Format(PyExc_ValueError, "%zd stretches, 32 are the most", count);
    for (Py_ssize_t i = 0; i < count; i++) {
        struct stretch *s = stretches + i;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(given, i), "iLnn", &s->fd, &s->offset, &s->begin, &s->count)) return NULL;
        if (s->count < 0 || s->begin < (i ? s[-1].begin + s[-1].count : 0) || s->begin > n || s->count > n - s->begin)
            return PyErr_Format(PyExc_ValueError, "stretch %zd of %zd bytes at %zd overlaps another or ends beyond %zd", i, s->count, s->begin, n);
    }
    struct digest d;
    uint64_t result = 0;
    Py_ssize_t failed = -1, done = 0;
    int error = 0;
    Py_BEGIN_ALLOW_THREADS;
    char *to = (char *)(uintptr_t)address;
    begin(&d, n);
    for (Py_ssize_t i = 0; i < count && failed < 0; i++) {
        struct stretch *s = stretches + i;
        for (done = 0; done < s->count;) {
            Py_ssize_t left = s->count - done;
            ssize_t got = pread(s->fd, to + s->begin + done, left < CHUNK ? left : CHUNK, s->offset + done);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                failed = i;
                error = got ? errno : 0;
                break;
            }
            done += got;
            take(&d, to, NULL, s->begin + done);
        }
    }
    if (failed < 0) result = end(&d, to, n);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("Knni", (unsigned long long)result, failed, done, error);
}

/* read_memory(address, num_bytes, pid, its address) -> (digest, 0), or (0, errno) when the process or its memory is not there, or is not ours
   to read. More than 240 bytes. */
static PyObject *read_memory(PyObject *self, PyObject *args) {
    unsigned long long address, from;
    Py_ssize_t n;
    int pid;
    if (!PyArg_ParseTuple(args, "KniK", &address, &n, &pid, &from)) return NULL;
    struct digest d;
    uint64_t result = 0;
    int error = 0;
    Py_BEGIN_ALLOW_THREADS;
    char *to = (char *)(uintptr_t)address;
    begin(&d, n);
    for (Py_ssize_t done = 0; done < n && !error;) {
        size_t count = n - done < CHUNK ? n - done : CHUNK;
        struct iovec here = {to + done, count}, there = {(void *)(uintptr_t)(from + done), count};
        ssize_t got = process_vm_readv(pid, &here, 1, &there, 1, 0);
        if (got <= 0) {
            error = got ? errno : EFAULT;
        } else {
            done += got;
            take(&d, to, NULL, done);
        }
    }
    if (!error) result = end(&d, to, n);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("Ki", (unsigned long long)result, error);
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS, NULL},
    {"read", read_stretches, METH_VARARGS, NULL},
    {"read_memory", read_memory, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_digest", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__digest(void) {
    return PyModule_Create(&module);
}
