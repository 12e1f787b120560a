// The two halves of each mixer block, X + drop(W2 drop(gelu(W1 LayerNorm(X) + b1)) + b2), forward and backward,
// with or without the skip connection (X +).
//
// The rows (an image's channels in token mixing, a batch's patches in channel mixing) are cut into tiles of R rows,
// and the hidden layer into blocks of BLOCK units. One block of a tile's hidden layer never leaves the core's
// caches: forward computes, uses and discards it; backward recomputes it. Hidden units lie in the vector lanes, so
// that every product below is the same small kernel,
//
//     C[m][lanes] += Σ_w A[m][w] · B[w][lanes],
//
// where a 32-bit word w is one float, or a pair of bfloat16 that vdpbf16ps multiplies and adds at once.
// Dropout masks are hashes of position and seed, so backward recomputes forward's masks.
//
// Determinism: the batch is cut into SLICES parts, whatever the number of threads. Each part has its own sums of
// the weight gradients, which are then added in the order of the parts.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16, ROWS = 8, WIDE = 8;  // floats in a vector; rows of a register tile 2, and 3, vectors wide
#elif defined(__AVX__)
constexpr int V = 8, ROWS = 6, WIDE = 4;
#else
constexpr int V = 4, ROWS = 4, WIDE = 4;
#endif
constexpr int TALL = 2 * ROWS;        // rows of a register tile one vector wide
constexpr int CHANNELS = 64;          // of the residual stream, at most
constexpr int SIDE = 16;              // positions, and channels, of a square
constexpr int R = V == 8 ? 96 : 128;  // rows in a tile: a multiple of TALL and of SIDE
constexpr int BLOCK = 2 * V;          // hidden units in a block
constexpr int GROUP = 8;   // blocks that share one product along the units, since its sums go through memory
constexpr int SLICES = 8;  // parts of a batch, and so the maximum number of busy threads

typedef float Vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef uint32_t Word;

inline Vec load(const void* p) { return *static_cast<const Vec*>(p); }
inline void store(void* p, Vec v) { *static_cast<Vec*>(p) = v; }
inline Vec broadcast(float x) { return Vec{} + x; }
inline float sum(Vec v) {
    float parts[V];
    store(parts, v);
    for (int n = V / 2; n; n /= 2)
        for (int i = 0; i < n; i++) parts[i] += parts[i + n];
    return parts[0];
}

// ---------------------------------------------------------------- dropout

// As dropout_scale in dropout.py: a word of two random 16-bit numbers from the sum of a row hash and a column hash.
struct Dropout {
    Word threshold, low, high;  // threshold out of 65536; the key's halves
    float scale;                // of the elements kept

    Dropout(int threshold, int64_t seed) : threshold(threshold), scale(65536.f / (65536 - threshold)) {
        uint64_t key = uint64_t(seed);
        for (int round = 0; round < 2; round++) key = (key ^ key >> 32) * 0xD6E8FEB86659FD93u;
        low = Word(key), high = Word(key >> 32);
    }
    Word row(Word index) const {
        index ^= low;
        index = (index ^ (index >> 16)) * 0x7FEB352Du ^ high;
        return mix(index);
    }
    Word column(Word index) const { return row(index | 1u << 31); }

    template <class T>
    static T mix(T word) {
        word = (word ^ (word >> 15)) * 0x846CA68Bu;
        return word ^ (word >> 16);
    }
};

// ---------------------------------------------------------------- the two precisions

struct KeepAll {};  // a mask that drops nothing

// A precision defines words, how to make them, and how to compute GELU. It computes F(ZS·z) = FS·gelu(z), with the
// derivative DS·gelu'(z). It may choose the factors, which are absorbed into the packed weights.
struct Float32 {
    static constexpr int PAIR = 1;  // elements in a word
    static constexpr float ZS = 1, FS = 2, DS = 2;

    static Vec dot(Vec sum, Word a, Vec b) {
        float x;
        memcpy(&x, &a, 4);
        return sum + x * b;
    }
    static Vec dot(Vec sum, Vec a, Vec b) { return sum + a * b; }
    static Word word(float a, float) {
        Word w;
        memcpy(&w, &a, 4);
        return w;
    }
    static Vec words(Vec a, Vec) { return a; }
    static int lane_of(int unit) { return unit; }
    static void put(Word* to, const float* from, int count) {
        if (count == SIDE) memcpy(to, from, SIDE * sizeof *to);  // a constant size is faster
        else memcpy(to, from, count * sizeof *to);
    }

    // F(z) = 2·gelu(z) = z + u - u·E(u) with u = |z| and E(u) = erfc(u/√2), or 2·sigmoid(-2w) in the tanh form, with
    // w = √(2/π)·(u + 0.044715 u³). E^(-1/16) is nearly a polynomial P, so F and F' need no exponential:
    // E' = -16·E·P'/P. P minimises the largest error on u < 5.6: without rounding, 2e-7 of gelu and 7e-7 of gelu'.
    struct Gelu {
        static constexpr int DEGREE = 8;
        Vec c[DEGREE + 1];
        explicit Gelu(bool tanh) {
            const float both[2][DEGREE + 1] = {{1, 4.98678808e-2, 2.11367548e-2, 3.28770059e-3, 2.94792877e-5,
                                                4.95450879e-5, 7.99818261e-6, -1.24444738e-6, 1.68480238e-7},
                                               {1, 4.98655392e-2, 2.11603481e-2, 3.15913215e-3, 1.52747472e-4,
                                                -1.03235516e-4, 9.1416018e-5, -1.32822109e-5, 1.03267335e-6}};
            for (int i = 0; i <= DEGREE; i++) c[i] = broadcast(both[tanh][i]);
        }
        void operator()(Vec z, Vec* f, Vec* derivative) const {
            const Bits sign = Bits{} + 0x80000000u;
            const Vec size = (Vec)((Bits)z & ~sign), u = size < 6.f ? size : broadcast(6.f);  // E(6) is nearly 0
            Vec p = c[DEGREE] * u + c[DEGREE - 1], slope = c[DEGREE];
            for (int i = DEGREE - 2; i >= 0; i--) {
                if (derivative) slope = slope * u + p;
                p = p * u + c[i];
            }
            const Vec inverse = 1.f / p, e2 = inverse * inverse, e4 = e2 * e2, e8 = e4 * e4, e = e8 * e8;
            *f = (z + size) - u * e;
            if (!derivative) return;
            const Vec rest = 1.f - e * (1.f - 16 * u * inverse * slope);
            *derivative = 1.f + (Vec)((Bits)rest ^ ((Bits)z & sign));
        }
    };
    // Which of BLOCK elements of a row dropout keeps, with two elements per column word.
    struct Keep {
        Bits half[2];
    };
    static Keep keep(Word threshold, Word row, const Word* columns) {
        const Bits words = Dropout::mix(*(const Bits*)columns + row);
        const Bits low = (Bits)((words & 0xFFFF) >= threshold), high = (Bits)((words >> 16) >= threshold);
        uint64_t pairs[V];
        for (int i = 0; i < V; i++) pairs[i] = low[i] | uint64_t(high[i]) << 32;
        Keep k;
        memcpy(&k, pairs, sizeof k);
        return k;
    }
    static Vec select(Vec v, Keep k, int half) { return (Vec)((Bits)v & k.half[half]); }
    static Vec add(Vec sum, Vec v, Keep k, int half) { return sum + select(v, k, half); }
    static Vec add(Vec sum, Vec v, KeepAll, int) { return sum + v; }
    // BLOCK hidden units: of one row as words along the units, or of two rows as words along the rows.
    struct Packed {
        Vec half[2];
    };
    static Packed pack(Vec a, Vec b, Keep k) { return {{select(a, k, 0), select(b, k, 1)}}; }
    static Packed pack(Vec a, Vec b, KeepAll) { return {{a, b}}; }
    static void store_units(Word* to, Packed p) { store(to, p.half[0]), store(to + V, p.half[1]); }
    static void store_rows(Word* to, Packed p, Packed q) { store_units(to, p), store_units(to + BLOCK, q); }
};

#if defined(__AVX512BF16__)
// F(u) = 2s·gelu(u/s) = u + |u|·erf(|u| / (s·√2)): u plus an even function, made of 32 parabolas of width 1/16 in
// |u|. The last one is |u| itself; with s = 7/16 it starts at |z| = 4.36, where gelu(-z) is 3e-5. The tanh form has
// tanh(√(2/π)·(z + 0.044715 z³)) in place of erf(z/√2).
struct alignas(64) GeluTable {
    float c[3][32];
    GeluTable(bool tanh) {
        const double s = 7. / 16, width = 1. / 16;
        auto f = [&](double u) {
            const double z = u / s;
            return u * (tanh ? std::tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
                             : std::erf(u / (s * std::sqrt(2.))));
        };
        for (int i = 0; i < 32; i++) {  // through the piece's three Chebyshev points
            double x[3], d[3];
            for (int j = 0; j < 3; j++) x[j] = width * (i + (j - 1) * std::sqrt(3.) / 4), d[j] = f(x[j]);
            double d01 = (d[1] - d[0]) / (x[1] - x[0]), d12 = (d[2] - d[1]) / (x[2] - x[1]);
            double c2 = (d12 - d01) / (x[2] - x[0]), c1 = d01 - c2 * (x[0] + x[1]);
            c[0][i] = i ? d[0] - x[0] * (c1 + c2 * x[0]) : 0, c[1][i] = i ? c1 : 0, c[2][i] = c2;
        }
        c[0][31] = 0, c[1][31] = 1, c[2][31] = 0;
    }
};
const GeluTable gelu_tables[] = {false, true};

struct Bfloat16 {
    static constexpr int PAIR = 2;
    static constexpr float ZS = 7.f / 16, FS = 2 * ZS, DS = 2;

    static Vec dot(Vec sum, Word a, Vec b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
    static Vec dot(Vec sum, Vec a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
    static Word round(float x) {  // to the nearest bfloat16, ties to even
        Word w;
        memcpy(&w, &x, 4);
        if (x != x) return w >> 16 | 0x40;  // NaN stays NaN
        return (w + 0x7FFF + ((w >> 16) & 1)) >> 16;
    }
    static Word word(float a, float b) { return round(a) | round(b) << 16; }
    static Vec words(Vec a, Vec b) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
        return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    // Up to 16 elements as words; an odd last one is paired with the zero after it.
    static void put(Word* to, const float* from, int count) {
        const __m256i packed = (__m256i)_mm512_cvtneps_pbh((__m512)load(from));
        if (count == SIDE) return _mm256_storeu_si256((__m256i*)to, packed);
        _mm256_mask_storeu_epi32(to, (1 << (count + 1) / 2) - 1, packed);
    }

    struct Gelu {
        Vec table[6];  // a copy that the compiler can keep in registers
        explicit Gelu(bool tanh) {
            for (int i = 0; i < 6; i++) table[i] = load(gelu_tables[tanh].c[0] + i * V);
        }
        static Vec look_up(Vec low, __m512i i, Vec high) {
            return (Vec)_mm512_permutex2var_ps((__m512)low, i, (__m512)high);
        }
        void operator()(Vec z, Vec* f, Vec* derivative) const {
            const Bits sign = Bits{} + 0x80000000u;
            const Vec u = (Vec)((Bits)z & ~sign);
            // 1.5 · 2^19 has steps of 1/16, so the low bits of the sum number the piece.
            const __m512i i = (__m512i)_mm512_min_ps((__m512)(u + 786432.f), _mm512_set1_ps(786432.f + 31.f / 16));
            const Vec c2 = look_up(table[4], i, table[5]), t = look_up(table[2], i, table[3]) + c2 * u;
            *f = (look_up(table[0], i, table[1]) + t * u) + z;
            if (derivative) *derivative = 1.f + (Vec)((Bits)(t + c2 * u) ^ ((Bits)z & sign));
        }
    };
    using Keep = __mmask32;
    static Keep keep(Word threshold, Word row, const Word* columns) {
        const Bits words = Dropout::mix((Bits)load(columns) + row);
        return _mm512_cmpge_epu16_mask((__m512i)words, _mm512_set1_epi16(threshold));
    }
    static Vec select(Vec v, Keep k, int half) { return (Vec)_mm512_maskz_mov_ps(k >> (half * V), (__m512)v); }
    static Vec add(Vec sum, Vec v, Keep k, int half) {
        return (Vec)_mm512_mask_add_ps((__m512)sum, k >> (half * V), (__m512)sum, (__m512)v);
    }
    static Vec add(Vec sum, Vec v, KeepAll, int) { return sum + v; }
    using Packed = __m512i;
    static Packed pack(Vec a, Vec b, Keep k) { return (__m512i)_mm512_maskz_cvtne2ps_pbh(k, (__m512)b, (__m512)a); }
    static Packed pack(Vec a, Vec b, KeepAll) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
    static void store_units(Word* to, Packed p) { store(to, (Vec)p); }
    // Unpacking interleaves within 128 bits and so permutes the units; lane_of gives their order.
    static void store_rows(Word* to, Packed p, Packed q) {
        store(to, (Vec)_mm512_unpacklo_epi16(p, q)), store(to + V, (Vec)_mm512_unpackhi_epi16(p, q));
    }
    static int lane_of(int unit) { return unit % 8 / 4 * V + unit / 8 * 4 + unit % 4; }
};
#endif

// ---------------------------------------------------------------- products

// Initial values of sums and their row stride: zeros, or the sums so far.
struct Start {
    const float* from;
    int64_t stride;
};
alignas(64) const float zeros[3 * V] = {};

template <class P, int AS, int M, int N>
inline void tile(const Word* a, const Word* b, int64_t bs, int words, float* c, int64_t cs, Start start) {
    if (words <= 0) __builtin_unreachable();  // otherwise GCC passes the sums through memory before the loop
    Vec acc[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[m][n] = load(start.from + m * start.stride + n * V);
    for (int w = 0; w < words; w++) {
        Vec row[N];
        for (int n = 0; n < N; n++) row[n] = load(b + w * bs + n * V);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) acc[m][n] = P::dot(acc[m][n], a[m * AS + w], row[n]);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * cs + n * V, acc[m][n]);
}

// The same for up to M rows; without `add`, sums start from zero.
template <class P, int AS, int M, int N>
void tile_of(int rows, const Word* a, const Word* b, int64_t bs, int words, float* c, int64_t cs, bool add) {
    if constexpr (M > 0) {
        if (rows < M) return tile_of<P, AS, M - 1, N>(rows, a, b, bs, words, c, cs, add);
        tile<P, AS, M, N>(a, b, bs, words, c, cs, add ? Start{c, cs} : Start{zeros, 0});
    }
}

// C (rows × vectors · V) += A (rows × words) · B (words × vectors · V), or = without `add`, in register tiles. The row
// stride AS of A is a constant, so that the compiler can address all rows from one register.
template <class P, int AS>
void add_product(const Word* a, const Word* b, int64_t bs, int words, float* c, int64_t cs, int rows, int vectors,
                 bool add = true) {
    const int most = vectors == 1 ? TALL : vectors == 2 ? ROWS : WIDE, parts = (rows + most - 1) / most;
    for (int part = 0; part < parts; part++) {
        const int m = int64_t(rows) * part / parts, count = int64_t(rows) * (part + 1) / parts - m;
        for (int n = 0; n < vectors;) {
            const int left = vectors - n, width = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
            auto run = width == 3   ? tile_of<P, AS, WIDE, 3>
                       : width == 2 ? tile_of<P, AS, ROWS, 2>
                                    : tile_of<P, AS, TALL, 1>;
            run(count, a + m * AS, b + n * V, bs, words, c + m * cs + n * V, cs, add);
            n += width;
        }
    }
}

// ---------------------------------------------------------------- threads

// A thread pool. Idle threads stay awake for the microseconds between two steps of a chain, then sleep. (GNU OpenMP's
// threads would spin for long and slow down any other process that needs the core.)
class Pool {
    static constexpr int LINGER = 2000;  // polls, about 30 µs

    std::mutex mutex;
    std::condition_variable wake, done;
    const std::function<void(int)>* job = nullptr;
    int count = 0, next = 0, running = 0, wanted = 0, started = 0;
    std::atomic<unsigned> turn{0};  // changes when a job starts and when it ends

    void work(std::unique_lock<std::mutex>& lock) {
        while (next < count) {
            const int i = next++;
            running++;
            lock.unlock();
            (*job)(i);
            lock.lock();
            running--;
        }
        if (!running) turn++, done.notify_all();
    }
    void linger(std::unique_lock<std::mutex>& lock) {
        const unsigned before = turn;
        lock.unlock();
        for (int i = 0; i < LINGER && turn.load(std::memory_order_relaxed) == before; i++) {
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#endif
        }
        lock.lock();
    }
    void serve(int id) {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return next < count && id < wanted; });
            work(lock);
            linger(lock);
        }
    }

   public:
    const pid_t owner = getpid();

    void run(int n, int threads, const std::function<void(int)>& f) {
        if (threads <= 1 || n <= 1) {
            for (int i = 0; i < n; i++) f(i);
            return;
        }
        std::unique_lock<std::mutex> lock(mutex);
        wanted = std::min(threads, n) - 1;
        try {
            for (; started < wanted; started++) std::thread(&Pool::serve, this, started).detach();
        } catch (const std::system_error&) {  // no more threads available: use those already started
        }
        job = &f, count = n, next = 0, turn++;
        wake.notify_all();
        work(lock);
        if (running) linger(lock);
        done.wait(lock, [&] { return next >= count && !running; });
    }
};

void parallel(int n, int threads, const std::function<void(int)>& f) {
    static Pool* pool = new Pool;  // never deleted: its threads may outlive main
    if (pool->owner != getpid()) pool = new Pool;  // a forked child has no threads
    pool->run(n, threads, f);
}

// ---------------------------------------------------------------- panels of 16 positions

// SIDE positions, in squares of SIDE channels each. The last square's missing channels are zero.
// A transposed panel is [channel][position].
struct alignas(64) Panel {
    float v[CHANNELS][SIDE];
};
using Row = float[SIDE];

// [position][channel] <-> [channel][position]
inline void transpose(Row* v) {
#if defined(__AVX512F__)
    const Bits lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Vec row[SIDE];
#pragma GCC unroll 16  // or GCC calls memcpy and keeps `row` in memory
    for (int i = 0; i < SIDE; i++) row[i] = load(v[i]);
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {  // swap the off-diagonal d×d parts of every 2d×2d part
        const int d = 1 << step;
        const Bits low = (lanes & d) ? (lanes ^ d) | 16 : lanes, high = (lanes & d) ? lanes | 16 : lanes | d;
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            if (!(i & d)) {
                const __m512 a = (__m512)row[i], b = (__m512)row[i + d];
                row[i] = (Vec)_mm512_permutex2var_ps(a, (__m512i)low, b);
                row[i + d] = (Vec)_mm512_permutex2var_ps(a, (__m512i)high, b);
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) store(v[i], row[i]);
#else
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < i; j++) std::swap(v[i][j], v[j][i]);
#endif
}

// LayerNorm of a transposed panel, in place, without the affine part.
struct Norm {
    alignas(64) float scale[SIDE];

    template <class Count>
    Norm(Panel& x, Count channels) {
        const float share = 1.f / channels;
        for (int i = 0; i < SIDE; i += V) {
            Vec mean{}, square{};
            for (int c = 0; c < channels; c++) mean += load(&x.v[c][i]);
            mean *= share;
            for (int c = 0; c < channels; c++) {
                const Vec d = load(&x.v[c][i]) - mean;
                square += d * d;
                store(&x.v[c][i], d);
            }
            store(scale + i, square * share + 1e-6f);
            for (int j = i; j < i + V; j++) scale[j] = 1 / std::sqrt(scale[j]);
            for (int c = 0; c < channels; c++) store(&x.v[c][i], load(&x.v[c][i]) * load(scale + i));
        }
    }
};

// ---------------------------------------------------------------- one call

struct Call {
    const float *x, *gamma, *beta, *w1, *b1, *w2, *b2, *grad;
    float *out, *d_gamma, *d_beta, *d_w1, *d_b1, *d_w2, *d_b2;  // out (in backward, d_x) may alias x or grad
    const int64_t* seeds;  // of the dropout on the hidden layer and on the outputs
    int64_t batch, patches, channels, hidden;
    int32_t over_patches, threshold, skip, tanh, threads;
};

// Memory that is never freed, cut from large blocks in huge pages, which save the processor page look-ups.
void* allocate(size_t bytes) {
    static std::mutex mutex;
    static char* block = nullptr;
    static size_t left = 0;
    std::lock_guard<std::mutex> lock(mutex);
    const size_t huge = 1 << 21;
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left) {
        left = (bytes + 2 * huge - 1) / huge * huge;
        block = static_cast<char*>(std::aligned_alloc(huge, left));
        if (!block) std::abort();
#if defined(MADV_HUGEPAGE)
        madvise(block, left, MADV_HUGEPAGE);
#endif
    }
    left -= bytes;
    return (block += bytes) - bytes;
}

// Kept from call to call. It grows with the model's sizes, not with the batch, so it rarely grows.
template <class T>
struct Buffer {
    T* data = nullptr;
    size_t capacity = 0;

    void reserve(size_t size) {
        if (size <= capacity) return;
        size = std::max(size, capacity + capacity / 2);  // the old memory is not freed
        data = static_cast<T*>(allocate(size * sizeof(T)));
        capacity = size;
    }
    void clear(size_t size) {
        if (size) std::memset(data, 0, size * sizeof(T));  // an empty buffer has no pointer
    }
    T& operator[](int64_t i) const { return data[i]; }
};

// Scaled weights as words. For products along the features: in_units, out_units [block][word of features][unit]. For
// products along the units: along [block][word of units][feature], rest [block][feature][word of units].
struct Weights {
    Buffer<Word> in_units, out_units, along, rest;
    Buffer<float> bias;
    Buffer<Word> columns;  // column hashes of the hidden layer's dropout
} weights;

// The data of one slice: sums of its weight gradients, and one tile's buffers.
struct Slice {
    Buffer<float> w1, w2, b1, b2;  // sums: [block][feature][lane] for w1 and w2, [unit], [feature]
    Word drop_rows[R];
    alignas(64) float gamma[CHANNELS][SIDE], beta[CHANNELS][SIDE];  // sums: [channel][position modulo SIDE]
    Buffer<Word> x_rows, g_rows;          // [row][word of features]
    Buffer<Word> x_features, g_features;  // [feature][word of rows]
    Buffer<Word> h_rows, d_rows;          // a block of the hidden layer and of its gradient: [word of rows][lane]
    Buffer<Word> h_units, d_units;        // the same for GROUP blocks: [row][word of units]
    Buffer<float> y, y_rest;              // product along the units: [row][feature], [feature][row][partial sum]
} slices[SLICES];

template <class P>
class Mixing {
    static constexpr int PAIR = P::PAIR, RW = R / PAIR, BW = BLOCK / PAIR, UW = GROUP * BW;
    // Backward has two products along the features. In bfloat16 their sums share the registers. In float32, where they
    // take twice as many steps, it is faster to compute one after the other, each in all registers.
    static constexpr bool TOGETHER = PAIR == 2;
    static constexpr int HALF = TOGETHER ? ROWS / 2 : ROWS;  // rows of each

    const Call& call;
    const bool backward, tokens;
    const int64_t positions;
    const int channels;
    const int features, words;  // of a row: its patches or channels
    const int blocks;           // of the hidden layer
    const int vectors, rest;    // features = vectors · V + rest; a large rest becomes another vector
    const int wide;             // vectors · V
    const int stride;           // rows of an image in token mixing: its channels, made whole words
    const int groups, group;    // a tile has `groups` images of `group` patches, or one group of R positions
    const int rows;             // of a tile, rounded up to whole register tiles
    const int tiles, parts;     // parts: the slices in use
    const Dropout drop_hidden, drop_out;
    Word drop_columns[CHANNELS / 2];  // column hashes of the outputs' dropout
    alignas(64) float b2[CHANNELS];   // in channel mixing

   public:
    Mixing(const Call& call, bool backward)
        : call(call),
          backward(backward),
          tokens(call.over_patches),
          positions(call.batch * call.patches),
          channels(call.channels),
          features(tokens ? call.patches : channels),
          words((features + PAIR - 1) / PAIR),
          blocks((call.hidden + BLOCK - 1) / BLOCK),
          vectors(features / V + (features % V > 4)),
          rest(features % V > 4 ? 0 : features % V),
          wide(vectors * V),
          stride((channels + PAIR - 1) / PAIR * PAIR),
          groups(tokens ? R / stride : 1),
          group(tokens ? call.patches : R),
          rows(tokens ? (groups * stride + TALL - 1) / TALL * TALL : R),
          tiles(tokens ? (call.batch + groups - 1) / groups : (positions + R - 1) / R),
          parts(std::min(tiles, SLICES)),
          drop_hidden(call.threshold, call.seeds[0]),
          drop_out(call.threshold, call.seeds[1]) {
        for (int i = 0; i < CHANNELS / 2; i++) drop_columns[i] = drop_out.column(i);
        for (int c = 0; c < CHANNELS; c++) b2[c] = c < features && !tokens ? call.b2[c] : 0;
    }

    void run() {
        // part: weights packed
        weights.bias.reserve(blocks * BLOCK);
        weights.in_units.reserve(int64_t(blocks) * words * BLOCK);
        weights.out_units.reserve(int64_t(blocks) * words * BLOCK);
        weights.along.reserve(int64_t(blocks) * BW * wide);
        weights.rest.reserve(int64_t(blocks) * BW * rest);
        weights.columns.reserve(blocks * BLOCK / 2);
        for (int i = 0; i < blocks * BLOCK / 2; i++) weights.columns[i] = drop_hidden.column(i);
        parallel(blocks, call.threads, [&](int block) { pack(block); });
        const bool drop = drop_hidden.threshold;
        parallel(parts, call.threads, [&](int i) {
            Slice& s = slices[i];
            prepare(s);
            const int first = int64_t(tiles) * i / parts, last = int64_t(tiles) * (i + 1) / parts;
            for (int t = first; t < last; t++) {
                if (backward) drop ? tile_backward<true>(t, s, t == first) : tile_backward<false>(t, s, t == first);
                else drop ? tile_forward<true>(t, s) : tile_forward<false>(t, s);
            }
        });
        // part: weight gradients summed over the slices
        if (backward) {
            parallel(blocks, call.threads, [&](int block) { reduce(block); });
            reduce_rest();
        }
        // part: outside the blocks (stem, head, loss, optimiser)
    }

   private:
    void pack(int block) {
        const int64_t hidden = call.hidden, first = int64_t(block) * BLOCK;
        const int there = std::min<int64_t>(BLOCK, hidden - first), padded = wide + rest;
        std::vector<float> by_feature((features + 1) * BLOCK), by_unit(BLOCK * padded);
        for (int h = 0; h < BLOCK; h++) weights.bias[first + h] = h < there ? P::ZS * call.b1[first + h] : 0;

        auto along_features = [&](Word* to, float scale) {
            const float* from = by_feature.data();
            for (int w = 0; w < words; w++)
                for (int h = 0; h < BLOCK; h += V)
                    store(to + w * BLOCK + h, P::words(scale * load(from + w * PAIR * BLOCK + h),
                                                       scale * load(from + (w * PAIR + PAIR - 1) * BLOCK + h)));
        };
        auto along_units = [&](float scale) {
            for (int w = 0; w < BW; w++) {
                const float *a = &by_unit[w * PAIR * padded], *b = a + (PAIR - 1) * padded;
                Word *to = &weights.along[(block * BW + w) * int64_t(wide)];
                Word *to_rest = &weights.rest[block * BW * rest];
                for (int k = 0; k < wide; k += V) store(to + k, P::words(scale * load(a + k), scale * load(b + k)));
                for (int k = 0; k < rest; k++) to_rest[k * BW + w] = P::word(scale * a[wide + k], scale * b[wide + k]);
            }
        };
        for (int h = 0; h < there; h++)
            std::memcpy(&by_unit[h * padded], call.w1 + (first + h) * features, features * sizeof(float));
        for (int k = 0; k < features; k++)
            for (int h = 0; h < there; h++) by_feature[k * BLOCK + h] = by_unit[h * padded + k];
        along_features(&weights.in_units[block * words * int64_t(BLOCK)], P::ZS);
        if (backward) along_units(1);
        for (int k = 0; k < features; k++)
            std::memcpy(&by_feature[k * BLOCK], call.w2 + k * hidden + first, there * sizeof(float));
        for (int h = 0; h < there && !backward; h++)
            for (int k = 0; k < features; k++) by_unit[h * padded + k] = by_feature[k * BLOCK + h];
        if (!backward) return along_units(drop_hidden.scale / P::FS);
        along_features(&weights.out_units[block * words * int64_t(BLOCK)], drop_hidden.scale / P::DS);
    }

    void prepare(Slice& s) const {
        s.x_rows.reserve(R * words), s.h_units.reserve(R * UW);
        s.y.reserve(R * wide), s.y_rest.reserve(rest * R * V);
        const bool gaps = tokens && groups * channels < rows;  // rows that nothing below writes
        if (gaps) s.x_rows.clear(R * words);
        if (!backward) return;
        s.g_rows.reserve(R * words), s.x_features.reserve(features * RW), s.g_features.reserve(features * RW);
        if (gaps) s.g_rows.clear(R * words), s.x_features.clear(features * RW), s.g_features.clear(features * RW);
        s.h_rows.reserve(RW * BLOCK), s.d_rows.reserve(RW * BLOCK), s.d_units.reserve(R * UW);
        const int64_t size = int64_t(blocks) * BLOCK * features;
        s.w1.reserve(size), s.w2.reserve(size), s.b1.reserve(blocks * BLOCK), s.b2.reserve(features + SIDE);
        s.b1.clear(blocks * BLOCK), s.b2.clear(features + SIDE);
        std::memset(s.gamma, 0, sizeof s.gamma), std::memset(s.beta, 0, sizeof s.beta);
    }

    // Calls f(first position, first feature or row within the group, group, number of existing positions, channels) for
    // every panel of a tile, including those beyond the end of the batch. The coursework's 16 channels are a constant,
    // since the compiler would otherwise round differently, and recorded results have these bits.
    template <class F>
    void panels(int t, F f) const {
        for (int g = 0; g < groups; g++) {
            const int64_t start = (int64_t(t) * groups + g) * group;
            for (int i = 0; i < group; i += SIDE) {
                const int count = std::clamp<int64_t>(positions - start - i, 0, std::min(SIDE, group - i));
                if (channels == SIDE) f(start + i, i, g, count, std::integral_constant<int, SIDE>());
                else f(start + i, i, g, count, channels);
            }
        }
    }
    // Calls f(square, its first channel, its number of channels) for every square of a panel.
    template <class F>
    void squares(Panel& panel, F f) const {
        for (int first = 0; first < channels; first += SIDE) f(panel.v + first, first, std::min(SIDE, channels - first));
    }
    void transpose(Panel& panel) const {
        squares(panel, [](Row* square, int, int) { ::transpose(square); });
    }

    // From memory, where positions are `channels` apart.
    void read(Panel& to, const float* from, int64_t position, int count) const {
        squares(to, [&](Row* square, int first, int there) {
            if (count < SIDE || there < SIDE) std::memset(square, 0, SIDE * sizeof *square);
            for (int j = 0; j < count; j++) copy(square[j], from + (position + j) * channels + first, there);
        });
    }
    static void copy(float* to, const float* from, int count) {
        if (count == SIDE) std::memcpy(to, from, SIDE * sizeof *to);  // a constant size is faster
        else std::memcpy(to, from, count * sizeof *to);
    }
    // to = from + y, or to = y without the skip connection
    void put(float* to, const float* from, Panel& y, int64_t position, int count) const {
        squares(y, [&](Row* square, int first, int there) {
            for (int j = 0; j < count; j++) {
                const int64_t at = (position + j) * channels + first;
                if (call.skip) {
                    Row x = {};
                    copy(x, from + at, there);
                    for (int c = 0; c < SIDE; c += V) store(&square[j][c], load(x + c) + load(&square[j][c]));
                }
                copy(to + at, square[j], there);
            }
        });
    }
    static void add_rows(const Row* from, float* to) {
        for (int j = 0; j < SIDE; j += V) {
            Vec total = load(to + j);
            for (int i = 0; i < SIDE; i++) total += load(&from[i][j]);
            store(to + j, total);
        }
    }

    // Store words along the channels, from [position][channel]: rows in channel mixing, features in token mixing.
    void put_channels(Panel& from, int i, int g, Buffer<Word>& rows, Buffer<Word>& features) const {
        const int between = tokens ? RW : words, count = std::min(SIDE, group - i);
        squares(from, [&](Row* square, int first, int there) {
            Word* to = (tokens ? &features[i * RW + g * stride / PAIR] : &rows[i * words]) + first / PAIR;
            for (int j = 0; j < count; j++) P::put(to + j * between, square[j], there);
        });
    }
    // Store words along the positions, from [channel][position].
    void put_positions(const Panel& from, int i, int g, Buffer<Word>& rows, Buffer<Word>& features) const {
        Word* to = (tokens ? &rows[g * stride * words] : features.data) + i / PAIR;
        const int between = tokens ? words : RW, count = std::min(SIDE, group - i);
        for (int c = 0; c < channels; c++) P::put(to + c * between, from.v[c], count);
    }

    void put_normalised(int t, Slice& s) const {
        panels(t, [&](int64_t position, int i, int g, int count, auto channels) {
            Panel x;
            read(x, call.x, position, count);
            transpose(x);
            Norm(x, channels);
            for (int c = 0; c < channels; c++) {
                for (int j = 0; j < SIDE; j += V) store(&x.v[c][j], load(&x.v[c][j]) * call.gamma[c] + call.beta[c]);
                for (int j = count; j < SIDE; j++) x.v[c][j] = 0;
            }
            if (backward || tokens) put_positions(x, i, g, s.x_rows, s.x_features);
            if (!backward && tokens) return;
            transpose(x);
            put_channels(x, i, g, s.x_rows, s.x_features);
        });
    }

    // Read a panel of the product along the units: [channel][position] in token mixing, else [position][channel].
    void get(Panel& to, int i, int g, const Slice& s) const {
        squares(to, [&](Row* square, int first_channel, int there) {
            const int first = tokens ? i : first_channel, row = tokens ? g * stride + first_channel : i;
            const int count = tokens ? there : SIDE;
            const int inside = std::clamp(wide - first, 0, SIDE), end = std::min(features, first + SIDE);
            if (count < SIDE || inside < SIDE) std::memset(square, 0, SIDE * sizeof *square);
            for (int a = 0; a < count; a++) {
                copy(square[a], &s.y[(row + a) * wide + first], inside);
                for (int k = first + inside; k < end; k++)
                    square[a][k - first] = s.y_rest[((k - wide) * R + row + a) * V];
            }
        });
    }

    // y += units · along, for the group of blocks that ends with this block.
    void add_along_units(int block, const Word* units, Slice& s) const {
        if (block % GROUP < GROUP - 1 && block < blocks - 1) return;
        const int first = block / GROUP * GROUP, along = (block + 1 - first) * BW;
        add_product<P, UW>(units, &weights.along[first * BW * int64_t(wide)], wide, along, s.y.data, wide, rows, vectors);
        for (int k = 0; k < rest; k++)
            for (int row = 0; row < rows; row += TALL) {
                float* to = &s.y_rest[(k * R + row) * V];
                Vec sums[TALL];
                for (int m = 0; m < TALL; m++) sums[m] = load(to + m * V);
                for (int i = 0; i < along; i += V) {
                    const Vec weight = load(&weights.rest[((first + i / BW) * rest + k) * int64_t(BW) + i % BW]);
                    for (int m = 0; m < TALL; m++) sums[m] = P::dot(sums[m], load(units + (row + m) * UW + i), weight);
                }
                for (int m = 0; m < TALL; m++) store(to + m * V, sums[m]);
            }
    }
    // Before and after a tile's blocks.
    void begin(int t, Slice& s) const {
        s.y.clear(R * wide), s.y_rest.clear(rest * R * V);
        for (int row = 0; row < rows; row++) {
            const int64_t image = int64_t(t) * groups + row / stride;
            s.drop_rows[row] = drop_hidden.row(tokens ? image * channels + row % stride : int64_t(t) * R + row);
        }
    }
    void finish(Slice& s) const {
        for (int i = 0; i < rest * R; i++) s.y_rest[i * V] = sum(load(&s.y_rest[i * V]));
    }

    // Which of a block's hidden units dropout keeps in a row (the weights include its scale).
    template <bool DROP>
    auto kept(const Slice& s, int row, int block) const {
        if constexpr (!DROP) return KeepAll{};
        else return P::keep(drop_hidden.threshold, s.drop_rows[row], &weights.columns[block * BLOCK / 2]);
    }
    // Apply dropout to the outputs of a panel, [position][channel].
    void drop_outputs(Panel& y, int64_t position) const {
        if (!drop_out.threshold) return;
        squares(y, [&](Row* square, int first, int) {
            Word sums[SIDE][SIDE / 2];
            for (int j = 0; j < SIDE; j++)
                for (int i = 0; i < SIDE / 2; i++) sums[j][i] = drop_out.row(position + j) + drop_columns[first / 2 + i];
            for (int i = 0; i < SIDE * SIDE; i += BLOCK) {
                const auto kept = P::keep(drop_out.threshold, 0, sums[0] + i / 2);
                for (int n = 0; n < 2; n++) {
                    float* at = square[0] + i + n * V;
                    store(at, P::select(load(at) * drop_out.scale, kept, n));
                }
            }
        });
    }

    // z += rows · units, along the features.
    template <int M>
    void add_features(Vec (&z)[M][2], const Word* rows, const Word* units) const {
        if (words <= 0) __builtin_unreachable();
        for (int w = 0; w < words; w++) {
            Vec a[2];
            for (int n = 0; n < 2; n++) a[n] = load(units + w * BLOCK + n * V);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < 2; n++) z[m][n] = P::dot(z[m][n], rows[m * words + w], a[n]);
        }
    }

    template <bool DROP>
    void tile_forward(int t, Slice& s) const {
        const typename P::Gelu gelu(call.tanh);
        // part: forward, LayerNorm
        put_normalised(t, s);
        begin(t, s);
        for (int block = 0; block < blocks; block++) {
            // part: forward, hidden layer with GELU and dropout
            const float* bias = &weights.bias[block * BLOCK];
            const Word *x = s.x_rows.data, *in = &weights.in_units[block * words * int64_t(BLOCK)];
            Word* const units = &s.h_units[block % GROUP * BW];
            for (int row = 0; row < rows; row += ROWS) {
                Vec z[ROWS][2];  // stays in registers from product to GELU, since 512-bit stores are slow
                for (int m = 0; m < ROWS; m++)
                    for (int n = 0; n < 2; n++) z[m][n] = load(bias + n * V);
                add_features(z, x + row * words, in);
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; m++) {
                    Vec f[2];
                    for (int n = 0; n < 2; n++) gelu(z[m][n], &f[n], nullptr);
                    P::store_units(units + (row + m) * UW, P::pack(f[0], f[1], kept<DROP>(s, row + m, block)));
                }
            }
            // part: forward, product along the hidden units
            add_along_units(block, s.h_units.data, s);
        }
        // part: forward, outputs
        finish(s);
        panels(t, [&](int64_t position, int i, int g, int count, auto) {
            Panel y;
            get(y, i, g, s);
            if (tokens) transpose(y);
            squares(y, [&](Row* square, int first, int) {
                for (int j = 0; j < count; j++)
                    for (int c = 0; c < SIDE; c += V)
                        store(&square[j][c],
                              load(&square[j][c]) + (tokens ? broadcast(call.b2[i + j]) : load(b2 + first + c)));
            });
            drop_outputs(y, position);
            put(call.out, call.x, y, position, count);
        });
    }

    template <bool DROP>
    void tile_backward(int t, Slice& s, bool first) const {
        const typename P::Gelu gelu(call.tanh);
        // part: backward, LayerNorm again, and the gradient read
        put_normalised(t, s);
        panels(t, [&](int64_t position, int i, int g, int count, auto) {
            Panel grad;
            read(grad, call.grad, position, count);
            drop_outputs(grad, position);
            put_channels(grad, i, g, s.g_rows, s.g_features);
            if (!tokens) squares(grad, [&](Row* square, int first, int) { add_rows(square, &s.b2[first]); });
            transpose(grad);
            put_positions(grad, i, g, s.g_rows, s.g_features);
            if (tokens) squares(grad, [&](Row* square, int, int) { add_rows(square, &s.b2[i]); });
        });
        begin(t, s);
        for (int block = 0; block < blocks; block++) {
            // part: backward, hidden layer again, and its gradient
            const int64_t at = block * words * int64_t(BLOCK);
            const Word *in = &weights.in_units[at], *out = &weights.out_units[at];
            const Word *x = s.x_rows.data, *g = s.g_rows.data;
            const float* bias = &weights.bias[block * BLOCK];
            Word *const h_rows = s.h_rows.data, *const d_rows = s.d_rows.data;
            Word* const units = &s.d_units[block % GROUP * BW];
            Vec b1[2] = {load(&s.b1[block * BLOCK]), load(&s.b1[block * BLOCK + V])};
            for (int row = 0; row < rows; row += HALF, x += HALF * words, g += HALF * words) {
                Vec z[HALF][2], d[HALF][2];
                for (int m = 0; m < HALF; m++)
                    for (int n = 0; n < 2; n++) z[m][n] = load(bias + n * V), d[m][n] = Vec{};
                if (words <= 0) __builtin_unreachable();
                for (int w = 0; w < words && TOGETHER; w++) {
                    Vec a[2], b[2];
                    for (int n = 0; n < 2; n++) a[n] = load(in + w * BLOCK + n * V);
                    for (int n = 0; n < 2; n++) b[n] = load(out + w * BLOCK + n * V);
                    for (int m = 0; m < HALF; m++) {
                        for (int n = 0; n < 2; n++) z[m][n] = P::dot(z[m][n], x[m * words + w], a[n]);
                        for (int n = 0; n < 2; n++) d[m][n] = P::dot(d[m][n], g[m * words + w], b[n]);
                    }
                }
                if (!TOGETHER) add_features(z, x, in), add_features(d, g, out);
#pragma GCC unroll 4
                for (int m = 0; m < HALF; m += 2) {
                    typename P::Packed packed[2], d_packed[2];
#pragma GCC unroll 2
                    for (int i = 0; i < 2; i++) {
                        const auto keep = kept<DROP>(s, row + m + i, block);
                        Vec f[2], derivative[2];
                        for (int n = 0; n < 2; n++) {
                            gelu(z[m + i][n], &f[n], &derivative[n]);
                            derivative[n] *= d[m + i][n];
                            b1[n] = P::add(b1[n], derivative[n], keep, n);
                        }
                        packed[i] = P::pack(f[0], f[1], keep);
                        d_packed[i] = P::pack(derivative[0], derivative[1], keep);
                        P::store_units(units + (row + m + i) * UW, d_packed[i]);
                    }
                    P::store_rows(h_rows + (row + m) / PAIR * BLOCK, packed[0], packed[1]);
                    P::store_rows(d_rows + (row + m) / PAIR * BLOCK, d_packed[0], d_packed[1]);
                }
            }
            for (int n = 0; n < 2; n++) store(&s.b1[block * BLOCK + n * V], b1[n]);
            // part: backward, weight gradients
            const int64_t sums = block * features * int64_t(BLOCK);
            const Word *g_features = s.g_features.data, *x_features = s.x_features.data;
            const int along = rows / PAIR;
            add_product<P, RW>(g_features, s.h_rows.data, BLOCK, along, &s.w2[sums], BLOCK, features, 2, !first);
            add_product<P, RW>(x_features, s.d_rows.data, BLOCK, along, &s.w1[sums], BLOCK, features, 2, !first);
            // part: backward, product along the hidden units
            add_along_units(block, s.d_units.data, s);
        }
        // part: backward, through LayerNorm
        finish(s);
        panels(t, [&](int64_t position, int i, int g, int count, auto channels) {
            Panel x, d;
            read(x, call.x, position, count);
            transpose(x);
            const Norm norm(x, channels);
            get(d, i, g, s);
            if (!tokens) transpose(d);
            for (int j = 0; j < SIDE; j += V) {
                Vec mean_d{}, mean_dx{};
                for (int c = 0; c < channels; c++) {
                    const Vec unit = load(&x.v[c][j]), dc = load(&d.v[c][j]), weighted = dc * call.gamma[c];
                    store(&s.gamma[c][j], load(&s.gamma[c][j]) + dc * unit);
                    store(&s.beta[c][j], load(&s.beta[c][j]) + dc);
                    mean_d += weighted, mean_dx += weighted * unit;
                }
                mean_d *= 1.f / channels, mean_dx *= 1.f / channels;
                for (int c = 0; c < channels; c++) {
                    const Vec inner = load(&d.v[c][j]) * call.gamma[c] - mean_d - load(&x.v[c][j]) * mean_dx;
                    store(&d.v[c][j], inner * load(norm.scale + j));
                }
            }
            transpose(d);
            put(call.out, call.grad, d, position, count);
        });
    }

    void reduce(int block) const {
        const int64_t first = int64_t(block) * BLOCK;
        const int there = std::min<int64_t>(BLOCK, call.hidden - first);
        std::vector<float> total(features * BLOCK);
        int lane[BLOCK];
        for (int h = 0; h < BLOCK; h++) lane[h] = P::lane_of(h);
        auto sum = [&](Buffer<float> Slice::*part, int64_t at, int count) {
            std::copy_n(&(slices[0].*part)[at], count, total.data());
            for (int i = 1; i < parts; i++)
                for (int j = 0; j < count; j++) total[j] += (slices[i].*part)[at + j];
        };
        sum(&Slice::b1, first, BLOCK);
        std::copy_n(total.data(), there, call.d_b1 + first);
        sum(&Slice::w1, first * features, features * BLOCK);
        for (int h = 0; h < there; h++)
            for (int k = 0; k < features; k++)
                call.d_w1[(first + h) * features + k] = total[k * BLOCK + lane[h]];
        sum(&Slice::w2, first * features, features * BLOCK);
        for (int k = 0; k < features; k++)
            for (int h = 0; h < there; h++)
                call.d_w2[k * call.hidden + first + h] = drop_hidden.scale / P::FS * total[k * BLOCK + lane[h]];
    }
    void reduce_rest() const {
        std::fill_n(call.d_b2, features, 0.f);
        std::fill_n(call.d_gamma, channels, 0.f), std::fill_n(call.d_beta, channels, 0.f);
        for (int part = 0; part < parts; part++) {
            const Slice& s = slices[part];
            for (int k = 0; k < features; k++) call.d_b2[k] += s.b2[k];
            for (int c = 0; c < channels; c++)
                for (int i = 0; i < SIDE; i++) call.d_gamma[c] += s.gamma[c][i], call.d_beta[c] += s.beta[c][i];
        }
    }
};

std::mutex one_call;  // the buffers are shared
// A child forked during a call would wait for ever for the lock of a thread that it lacks.
const int at_fork = pthread_atfork([] { one_call.lock(); }, [] { one_call.unlock(); }, [] { one_call.unlock(); });

}  // namespace

extern "C" int mixing_has_bfloat16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// For eager PyTorch: dropout_scale of dropout.py, with elements of type T. `kept` is the bits of 1 / (1 - p). A row is
// written in pairs, which compilers vectorise.
template <class T, class Pair>
void dropout_scale(T* out, int64_t rows, int64_t columns, const Dropout& dropout, T kept, int threads) {
    typedef Pair Pairs __attribute__((may_alias, aligned(alignof(T))));
    std::vector<Word> hashes((columns + 1) / 2);
    for (size_t i = 0; i < hashes.size(); i++) hashes[i] = dropout.column(i);
    parallel(SLICES, threads, [&, kept, dropped = dropout.threshold](int slice) {
        const auto factor = [=](Word half) { return half < dropped ? T(0) : kept; };
        for (int64_t r = rows * slice / SLICES; r < rows * (slice + 1) / SLICES; r++) {
            const Word row = dropout.row(r), *__restrict column = hashes.data();
            const int64_t pairs = columns / 2;
            Pairs* __restrict to = reinterpret_cast<Pairs*>(out + r * columns);
            for (int64_t i = 0; i < pairs; i++) {
                const Word word = Dropout::mix(row + column[i]);
                to[i] = factor(word & 0xFFFF) | Pair(factor(word >> 16)) << (8 * sizeof(T));
            }
            if (columns % 2) out[(r + 1) * columns - 1] = factor(Dropout::mix(row + hashes.back()) & 0xFFFF);
        }
    });
}

extern "C" void mixing_dropout(void* out, int64_t rows, int64_t columns, int threshold, int64_t seed, Word kept,
                               int bytes, int threads) {
    std::lock_guard<std::mutex> lock(one_call);
    const Dropout dropout(threshold, seed);
    if (bytes == 2)
        dropout_scale<uint16_t, uint32_t>(static_cast<uint16_t*>(out), rows, columns, dropout, kept, threads);
    else
        dropout_scale<uint32_t, uint64_t>(static_cast<uint32_t*>(out), rows, columns, dropout, kept, threads);
}

// For the tests: GELU and its derivative as a tile computes them. `count` is a multiple of V.
template <class P>
void gelu(const float* z, float* value, float* derivative, int64_t count, bool tanh) {
    const typename P::Gelu gelu(tanh);
    for (int64_t i = 0; i < count; i += V) {
        Vec f, d;
        gelu(P::ZS * load(z + i), &f, &d);
        store(value + i, f / P::FS), store(derivative + i, d / P::DS);
    }
}

extern "C" void mixing_gelu(const float* z, float* value, float* derivative, int64_t count, int tanh, int bfloat16) {
#if defined(__AVX512BF16__)
    if (bfloat16) return gelu<Bfloat16>(z, value, derivative, count, tanh);
#endif
    gelu<Float32>(z, value, derivative, count, tanh);
}

// The arguments from fused.py: the mixings of all blocks in order, alternating between patches and channels. Each has
// six parameters, in the order of Call, a hidden width and two seeds.
struct Chain {
    const float* x;
    const float* const* parameters;
    const int64_t *hidden, *seeds;
    int64_t mixings, batch, patches, channels;
    int32_t threshold, skip, tanh, threads, bfloat16;

    int64_t size() const { return batch * patches * channels; }
    void run(int i, const float* from, const float* grad, float* to, float* const* gradients) const {
        const float* const* w = parameters + 6 * i;
        float* d[6] = {};
        if (grad) std::copy_n(gradients + 6 * i, 6, d);
        const Call call = {from, w[0], w[1], w[2], w[3], w[4], w[5], grad, to, d[0], d[1], d[2], d[3], d[4], d[5],
                           seeds + 2 * i, batch, patches, channels, hidden[i], i % 2 == 0, threshold, skip, tanh, threads};
#if defined(__AVX512BF16__)
        if (bfloat16) return Mixing<Bfloat16>(call, grad != nullptr).run();
#endif
        Mixing<Float32>(call, grad != nullptr).run();
    }
};

// stream: receives the outputs of all mixings but the last; may be null.
extern "C" void mixing_forward(const Chain* chain, float* stream, float* out) {
    std::lock_guard<std::mutex> lock(one_call);
    const float* from = chain->x;
    for (int i = 0; i < chain->mixings; i++) {
        float* to = stream && i < chain->mixings - 1 ? stream + i * chain->size() : out;
        chain->run(i, from, nullptr, to, nullptr);
        from = to;
    }
}

// gradients: of x, then of the parameters.
extern "C" void mixing_backward(const Chain* chain, const float* stream, const float* grad, float* const* gradients) {
    std::lock_guard<std::mutex> lock(one_call);
    for (int i = chain->mixings - 1; i >= 0; i--) {
        chain->run(i, i ? stream + (i - 1) * chain->size() : chain->x, grad, gradients[0], gradients + 1);
        grad = gradients[0];
    }
}
