// One half of a mixer block, X + drop(W2 drop(gelu(W1 LayerNorm(X) + b1)) + b2), forward and backward.
//
// The rows (an image's channels in token mixing, a batch's patches in channel mixing) are cut into tiles of R rows,
// the hidden layer into blocks of BLOCK units, and a block of a tile's hidden layer never leaves the first-level
// cache: forward makes it, uses it up and forgets it; backward makes it again. Hidden units lie in the vector
// lanes, so that every product below is the same small kernel,
//
//     C[m][lanes] += Σ_w A[m][w] · B[w][lanes],
//
// where a word w of 32 bits is one float, or a pair of bfloat16 that vdpbf16ps multiplies and adds at once.
// The dropout masks are hashes of position and seed, so backward draws the forward's masks anew.
//
// Determinism: the batch is cut into SLICES parts, whatever the number of threads; each has its own sums of the
// weight gradients, and these are added in the order of the slices.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16, ROWS = 8;  // floats in a vector; rows of a register tile, 2 or 3 vectors wide
#elif defined(__AVX__)
constexpr int V = 8, ROWS = 4;
#else
constexpr int V = 4, ROWS = 4;
#endif
constexpr int C = 16;         // channels of the residual stream
constexpr int R = 128;        // rows in a tile
constexpr int BLOCK = 2 * V;  // hidden units in a block
constexpr int GROUP = 8;      // blocks that share one product along the units: its sums go through memory
constexpr int SLICES = 8;

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

struct Dropout {
    Word threshold = 0, low = 0, high = 0;  // of 65536; the key
    float scale = 1;

    Dropout(int threshold, int64_t seed, int stream) : threshold(threshold) {
        uint64_t key = uint64_t(seed) + stream * 0x9E3779B97F4A7C15u;
        for (int round = 0; round < 2; round++) key = (key ^ key >> 32) * 0xD6E8FEB86659FD93u;
        low = Word(key), high = Word(key >> 32);
        scale = 65536.f / (65536 - threshold);
    }
    // The hash of fused.py's dropout_scale: two 16-bit random numbers from a counter.
    template <class T>
    T hash(T word) const {
        word ^= low;
        word = (word ^ (word >> 16)) * 0x7FEB352Du ^ high;
        word = (word ^ (word >> 15)) * 0x846CA68Bu;
        return word ^ (word >> 16);
    }
    // What the channels of one position are multiplied with on the way out.
    void channels(int64_t position, float* factor) const {
        for (int i = 0; i < C / 2; i++) {
            Word word = threshold ? hash(Word(position) * (C / 2) + i) : ~0u;
            factor[2 * i] = (word & 0xFFFF) >= threshold ? scale : 0.f;
            factor[2 * i + 1] = (word >> 16) >= threshold ? scale : 0.f;
        }
    }
};

// ---------------------------------------------------------------- the two precisions

// A precision says what a word is, how to make words, and how to compute GELU. It computes F(ZS·z) = FS·gelu(z), of
// which the derivative is DS·gelu'(z), where the factors are for it to choose: they go into the packed weights.
struct Float32 {
    static constexpr int PAIR = 1;  // elements in a word
    static constexpr float ZS = 1, FS = 1, DS = 1;

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
    static int lane_of(int unit) { return unit; }
    static void put(Word* to, const float* from, int count) { memcpy(to, from, count * sizeof *to); }

    // exp(x) for x <= 0: 2^n · e^r with |r| <= ln(2)/2, relative error below 2e-7.
    static Vec exp(Vec x) {
        x = x > -87.f ? x : broadcast(-87.f);
        const float magic = 12582912.f;  // 1.5 · 2^23: adding it rounds to an integer
        Vec n = x * 1.44269504f + magic;
        Bits exponent = (Bits)n << 23;
        n -= magic;
        Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
        Vec p = broadcast(1.f / 5040);
        for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) p = p * r + c;
        return (Vec)((Bits)p + exponent);
    }
    // erfc by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7).
    static void gelu(Vec z, Vec* f, Vec* derivative) {
        Vec u = z < 0.f ? -z : z;
        Vec e = exp(-0.5f * u * u);
        Vec t = 1.f / (1.f + (0.3275911f * 0.70710678f) * u);
        Vec tail = broadcast(0.5f * 1.061405429f);  // to be Φ(-u)
        for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) tail = tail * t + 0.5f * c;
        tail = tail * t * e;
        Vec phi = z < 0.f ? tail : 1.f - tail;
        *f = z * phi;
        if (derivative) *derivative = phi + z * (0.398942280f * e);
    }
    // Hidden units of one row, dropped out: as words along the units, and (of two rows) as words along the rows.
    struct Keep {
        Bits half[2];
    };
    static Keep keep(const Dropout& drop, Word first) {
        Keep k;
        Word bits[BLOCK];
        for (int i = 0; i < BLOCK / 2; i++) {
            Word word = drop.hash(first + i);
            bits[2 * i] = (word & 0xFFFF) >= drop.threshold ? ~0u : 0;
            bits[2 * i + 1] = (word >> 16) >= drop.threshold ? ~0u : 0;
        }
        memcpy(&k, bits, sizeof k);
        return k;
    }
    static Keep keep_all() { return {{~Bits{}, ~Bits{}}}; }
    static Vec add(Vec sum, Vec v, Keep k, int half) { return sum + (Vec)((Bits)v & k.half[half]); }
    struct Packed {
        Vec half[2];
    };
    static Packed pack(Vec a, Vec b, Keep k) { return {{(Vec)((Bits)a & k.half[0]), (Vec)((Bits)b & k.half[1])}}; }
    static void store_units(Word* to, Packed p) { store(to, p.half[0]), store(to + V, p.half[1]); }
    static void store_rows(Word* to, Packed p, Packed q) { store_units(to, p), store_units(to + BLOCK, q); }
};

#if defined(__AVX512BF16__)
// F(u) = 2s·gelu(u/s) = u + |u|·erf(|u| / (s·√2)): an even function added to u, by 32 parabolas of width 1/16 in
// |u|, the last of which is |u| itself. s = 7/16 makes it begin at |z| = 4.36, where gelu(-z) is 3e-5.
struct GeluTable {
    float c[3][32];
    GeluTable() {
        const double s = 7. / 16, width = 1. / 16;
        auto f = [&](double u) { return u * std::erf(u / (s * std::sqrt(2.))); };
        for (int i = 0; i < 32; i++) {  // through three Chebyshev points of the piece
            double x[3], d[3];
            for (int j = 0; j < 3; j++) x[j] = width * (i + (j - 1) * std::sqrt(3.) / 4), d[j] = f(x[j]);
            double d01 = (d[1] - d[0]) / (x[1] - x[0]), d12 = (d[2] - d[1]) / (x[2] - x[1]);
            double c2 = (d12 - d01) / (x[2] - x[0]), c1 = d01 - c2 * (x[0] + x[1]);
            c[0][i] = i ? d[0] - x[0] * (c1 + c2 * x[0]) : 0, c[1][i] = i ? c1 : 0, c[2][i] = c2;
        }
        c[0][31] = 0, c[1][31] = 1, c[2][31] = 0;
    }
};
const GeluTable gelu_table;

struct Bfloat16 {
    static constexpr int PAIR = 2;
    static constexpr float ZS = 7.f / 16, FS = 2 * ZS, DS = 2;

    static Vec dot(Vec sum, Word a, Vec b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
    static Vec dot(Vec sum, Vec a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
    static Word round(float x) {  // to the nearest bfloat16, of ties to the even one
        Word w;
        memcpy(&w, &x, 4);
        return (w + 0x7FFF + ((w >> 16) & 1)) >> 16;
    }
    static Word word(float a, float b) { return round(a) | round(b) << 16; }
    // Up to 16 elements as words; an odd one is paired with the zero that follows it.
    static void put(Word* to, const float* from, int count) {
        const __m256i packed = (__m256i)_mm512_cvtneps_pbh((__m512)load(from));
        _mm256_mask_storeu_epi32(to, (1 << (count + 1) / 2) - 1, packed);
    }

    static void gelu(Vec z, Vec* f, Vec* derivative) {
        const __m512* c = reinterpret_cast<const __m512*>(gelu_table.c);
        const Bits sign = Bits{} + 0x80000000u;
        Vec u = (Vec)((Bits)z & ~sign);
        // 1.5 · 2^19 has steps of 1/16, so its low bits count the pieces.
        __m512 at = _mm512_min_ps((__m512)(u + 786432.f), _mm512_set1_ps(786432.f + 31.f / 16));
        __m512i i = _mm512_castps_si512(at);
        Vec c0 = (Vec)_mm512_permutex2var_ps(c[0], i, c[1]);
        Vec c1 = (Vec)_mm512_permutex2var_ps(c[2], i, c[3]);
        Vec c2 = (Vec)_mm512_permutex2var_ps(c[4], i, c[5]);
        Vec t = c1 + c2 * u;
        *f = (c0 + t * u) + z;
        if (derivative) *derivative = 1.f + (Vec)((Bits)(t + c2 * u) ^ ((Bits)z & sign));
    }
    using Keep = __mmask32;
    static Keep keep(const Dropout& drop, Word first) {
        static const Bits lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return _mm512_cmpge_epu16_mask((__m512i)drop.hash(lanes + first), _mm512_set1_epi16(drop.threshold));
    }
    static Keep keep_all() { return ~0u; }
    static Vec add(Vec sum, Vec v, Keep k, int half) {
        return (Vec)_mm512_mask_add_ps((__m512)sum, k >> (half * V), (__m512)sum, (__m512)v);
    }
    using Packed = __m512i;
    static Packed pack(Vec a, Vec b, Keep k) {
        return (__m512i)_mm512_maskz_cvtne2ps_pbh(k, (__m512)b, (__m512)a);
    }
    static void store_units(Word* to, Packed p) { store(to, (Vec)p); }
    // Unpacking interleaves within 128 bits, so the units end up in an order of their own; lane_of knows it.
    static void store_rows(Word* to, Packed p, Packed q) {
        store(to, (Vec)_mm512_unpacklo_epi16(p, q)), store(to + V, (Vec)_mm512_unpackhi_epi16(p, q));
    }
    static int lane_of(int unit) { return unit % 8 / 4 * V + unit / 8 * 4 + unit % 4; }
};
#endif

// ---------------------------------------------------------------- products

enum Start { ZERO, FROM_C, BIAS };  // a bias is a row of C's width

template <class P, int M, int N>
inline void tile(const Word* a, int64_t as, const Word* b, int64_t bs, int words, float* c, int64_t cs, Start start,
                 const float* bias) {
    Vec acc[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            acc[m][n] = start == ZERO ? Vec{} : load(start == BIAS ? bias + n * V : c + m * cs + n * V);
    for (int w = 0; w < words; w++) {
        Vec row[N];
        for (int n = 0; n < N; n++) row[n] = load(b + w * bs + n * V);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) acc[m][n] = P::dot(acc[m][n], a[m * as + w], row[n]);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * cs + n * V, acc[m][n]);
}

template <class P, int M, int N>
void tile_of(int rows, const Word* a, int64_t as, const Word* b, int64_t bs, int words, float* c, int64_t cs) {
    if constexpr (M > 0) {
        if (rows == M) return tile<P, M, N>(a, as, b, bs, words, c, cs, FROM_C, nullptr);
        tile_of<P, M - 1, N>(rows, a, as, b, bs, words, c, cs);
    }
}

// C (rows × vectors · V) += A (rows × words) · B (words × vectors · V), cut into register tiles.
template <class P>
void add_product(const Word* a, int64_t as, const Word* b, int64_t bs, int words, float* c, int64_t cs, int rows,
                 int vectors) {
    const int parts = (rows + ROWS - 1) / ROWS;
    for (int part = 0; part < parts; part++) {
        const int m = rows * part / parts, count = rows * (part + 1) / parts - m;
        for (int n = 0; n < vectors;) {
            const int left = vectors - n, width = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
            auto run = width == 3 ? tile_of<P, ROWS, 3> : width == 2 ? tile_of<P, ROWS, 2> : tile_of<P, ROWS, 1>;
            run(count, a + m * as, as, b + n * V, bs, words, c + m * cs + n * V, cs);
            n += width;
        }
    }
}

// ---------------------------------------------------------------- threads

// A pool of sleeping threads. (GNU OpenMP's would spin, and slow down whoever else needs the core.)
class Pool {
    std::mutex mutex;
    std::condition_variable wake, done;
    const std::function<void(int)>* job = nullptr;
    int count = 0, next = 0, running = 0, wanted = 0, started = 0;

    void work(std::unique_lock<std::mutex>& lock) {
        while (next < count) {
            const int i = next++;
            running++;
            lock.unlock();
            (*job)(i);
            lock.lock();
            running--;
        }
        if (!running) done.notify_all();
    }
    void serve(int id) {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return next < count && id < wanted; });
            work(lock);
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
        for (; started < wanted; started++) std::thread(&Pool::serve, this, started).detach();
        job = &f, count = n, next = 0;
        wake.notify_all();
        work(lock);
        done.wait(lock, [&] { return next >= count && !running; });
    }
};

void parallel(int n, int threads, const std::function<void(int)>& f) {
    static Pool* pool = new Pool;  // never deleted: its threads may outlive main
    if (pool->owner != getpid()) pool = new Pool;  // a fork takes no threads along
    pool->run(n, threads, f);
}

// ---------------------------------------------------------------- blocks of 16 positions

struct alignas(64) Square {
    float v[C][C];

    // [position][channel] <-> [channel][position]
    void transpose() {
#if defined(__AVX512F__)
        static const Bits lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int d = 1; d < C; d *= 2) {  // swap the off-diagonal d×d blocks of every 2d×2d block
            const Bits low = (lanes & d) ? (lanes ^ d) | 16 : lanes, high = (lanes & d) ? lanes | 16 : lanes | d;
            for (int i = 0; i < C; i++)
                if (!(i & d)) {
                    const __m512 a = (__m512)load(v[i]), b = (__m512)load(v[i + d]);
                    store(v[i], (Vec)_mm512_permutex2var_ps(a, (__m512i)low, b));
                    store(v[i + d], (Vec)_mm512_permutex2var_ps(a, (__m512i)high, b));
                }
        }
#else
        for (int i = 0; i < C; i++)
            for (int j = 0; j < i; j++) std::swap(v[i][j], v[j][i]);
#endif
    }
};

// LayerNorm of a square [channel][position] in place, without its affine part.
struct Norm {
    alignas(64) float scale[C];

    explicit Norm(Square& x) {
        alignas(64) float mean[C] = {}, square[C] = {};
        for (int c = 0; c < C; c++)
            for (int i = 0; i < C; i++) mean[i] += x.v[c][i] * (1.f / C);
        for (int c = 0; c < C; c++)
            for (int i = 0; i < C; i++) x.v[c][i] -= mean[i], square[i] += x.v[c][i] * x.v[c][i];
        for (int i = 0; i < C; i++) scale[i] = 1 / std::sqrt(square[i] * (1.f / C) + 1e-6f);
        for (int c = 0; c < C; c++)
            for (int i = 0; i < C; i++) x.v[c][i] *= scale[i];
    }
};

// ---------------------------------------------------------------- one call

struct Call {  // what fused.py passes
    const float *x, *gamma, *beta, *w1, *b1, *w2, *b2, *grad;
    float *out, *d_gamma, *d_beta, *d_w1, *d_b1, *d_w2, *d_b2;  // out is d_x in the backward pass
    const int64_t* seed;
    int64_t batch, patches, hidden;
    int32_t over_patches, threshold, threads;
};

// Memory that starts at a cache line and is kept from call to call.
template <class T>
struct Buffer {
    T* data = nullptr;
    size_t capacity = 0;

    void reserve(size_t size) {
        if (size <= capacity) return;
        std::free(data);
        capacity = (size + 1023) / 1024 * 1024;
        data = static_cast<T*>(std::aligned_alloc(4096, capacity * sizeof(T)));
        if (!data) std::abort();
    }
    void clear(size_t size) { std::memset(data, 0, size * sizeof(T)); }
    T& operator[](int64_t i) const { return data[i]; }
};

// Weights as words, scaled. in_units, out_units [block][word of features][unit]: for products along the features;
// along [block][word of units][feature], rest [block][feature][word of units]: for products along the units.
struct Weights {
    Buffer<Word> in_units, out_units, along, rest;
    Buffer<float> bias;
} weights;

// What one slice needs: the sums of its weight gradients and a tile's data.
struct Slice {
    Buffer<float> w1, w2, b1, b2;  // sums: [block][feature][lane], the same, [unit], [feature]
    alignas(64) float gamma[C][C], beta[C][C];  // sums: [channel][position modulo C]
    Buffer<Word> x_rows, g_rows;          // [row][word of features]
    Buffer<Word> x_features, g_features;  // [feature][word of rows]
    Buffer<Word> h_rows, d_rows;          // a block of the hidden layer and of its gradient: [word of rows][lane]
    Buffer<Word> h_units, d_units;        // of GROUP blocks: [row][word of units]
    Buffer<float> y, y_rest;              // the product along the units: [row][feature], [feature][row][partial sum]
} slices[SLICES];

template <class P>
class Mixing {
    static constexpr int PAIR = P::PAIR, RW = R / PAIR, BW = BLOCK / PAIR, CW = C / PAIR, UW = GROUP * BW;

    const Call& call;
    const bool backward, tokens;
    const int64_t positions;
    const int features, words;  // of a row: patches or channels
    const int blocks;           // of the hidden layer
    const int vectors, rest;    // features = vectors · V + rest; a large rest makes another vector
    const int wide;             // vectors · V
    const int groups, group;    // a tile has `groups` images of `group` patches, or one group of R positions
    const int tiles;
    const Dropout drop_hidden, drop_out;

   public:
    Mixing(const Call& call, bool backward)
        : call(call),
          backward(backward),
          tokens(call.over_patches),
          positions(call.batch * call.patches),
          features(tokens ? call.patches : C),
          words((features + PAIR - 1) / PAIR),
          blocks((call.hidden + BLOCK - 1) / BLOCK),
          vectors(features / V + (features % V > 4)),
          rest(features % V > 4 ? 0 : features % V),
          wide(vectors * V),
          groups(tokens ? R / C : 1),
          group(tokens ? call.patches : R),
          tiles(tokens ? (call.batch + groups - 1) / groups : (positions + R - 1) / R),
          drop_hidden(call.threshold, *call.seed, 0),
          drop_out(call.threshold, *call.seed, 1) {}

    void run() {
        weights.bias.reserve(blocks * BLOCK);
        weights.in_units.reserve(int64_t(blocks) * words * BLOCK);
        weights.out_units.reserve(int64_t(blocks) * words * BLOCK);
        weights.along.reserve(int64_t(blocks) * BW * wide);
        weights.rest.reserve(int64_t(blocks) * BW * rest);
        parallel(blocks, call.threads, [&](int block) { pack(block); });
        parallel(SLICES, call.threads, [&](int i) {
            Slice& s = slices[i];
            prepare(s);
            for (int t = int64_t(tiles) * i / SLICES; t < int64_t(tiles) * (i + 1) / SLICES; t++)
                backward ? tile_backward(t, s) : tile_forward(t, s);
        });
        if (backward) {
            parallel(blocks, call.threads, [&](int block) { reduce(block); });
            reduce_rest();
        }
    }

   private:
    void pack(int block) {
        const int64_t hidden = call.hidden, first = int64_t(block) * BLOCK;
        const int there = std::min<int64_t>(BLOCK, hidden - first), padded = wide + rest;
        std::vector<float> w1(BLOCK * padded), w2 = w1, w1t((features + 1) * BLOCK), w2t = w1t;
        for (int h = 0; h < BLOCK; h++) weights.bias[first + h] = h < there ? P::ZS * call.b1[first + h] : 0;
        for (int h = 0; h < there; h++)
            for (int k = 0; k < features; k++)
                w1[h * padded + k] = w1t[k * BLOCK + h] = call.w1[(first + h) * features + k];
        for (int k = 0; k < features; k++)
            for (int h = 0; h < there; h++)
                w2[h * padded + k] = w2t[k * BLOCK + h] = call.w2[k * hidden + first + h];

        auto along_features = [&](Word* to, const float* from, float scale) {
            for (int w = 0; w < words; w++)
                for (int h = 0; h < BLOCK; h++)
                    to[w * BLOCK + h] = P::word(scale * from[w * PAIR * BLOCK + h],
                                                scale * from[(w * PAIR + PAIR - 1) * BLOCK + h]);
        };
        auto along_units = [&](const float* from, float scale) {
            for (int w = 0; w < BW; w++) {
                const float *a = from + w * PAIR * padded, *b = from + (w * PAIR + PAIR - 1) * padded;
                Word *to = &weights.along[(block * BW + w) * int64_t(wide)], *to_rest = &weights.rest[block * BW * rest];
                for (int k = 0; k < wide; k++) to[k] = P::word(scale * a[k], scale * b[k]);
                for (int k = 0; k < rest; k++) to_rest[k * BW + w] = P::word(scale * a[wide + k], scale * b[wide + k]);
            }
        };
        along_features(&weights.in_units[block * words * int64_t(BLOCK)], w1t.data(), P::ZS);
        if (!backward) return along_units(w2.data(), drop_hidden.scale / P::FS);
        along_features(&weights.out_units[block * words * int64_t(BLOCK)], w2t.data(), drop_hidden.scale / P::DS);
        along_units(w1.data(), 1);
    }

    void prepare(Slice& s) const {
        s.x_rows.reserve(R * words), s.h_units.reserve(R * UW);
        s.y.reserve(R * wide), s.y_rest.reserve(rest * R * V);
        if (!backward) return;
        s.g_rows.reserve(R * words), s.x_features.reserve(features * RW), s.g_features.reserve(features * RW);
        s.h_rows.reserve(RW * BLOCK), s.d_rows.reserve(RW * BLOCK), s.d_units.reserve(R * UW);
        const int64_t size = int64_t(blocks) * BLOCK * features;
        s.w1.reserve(size), s.w2.reserve(size), s.b1.reserve(blocks * BLOCK), s.b2.reserve(features + C);
        s.w1.clear(size), s.w2.clear(size), s.b1.clear(blocks * BLOCK), s.b2.clear(features + C);
        std::memset(s.gamma, 0, sizeof s.gamma), std::memset(s.beta, 0, sizeof s.beta);
    }

    // Calls f(first position, first feature or row within the group, group, how many positions are there) for every
    // square of a tile, those beyond the end of the batch included.
    template <class F>
    void squares(int t, F f) const {
        for (int g = 0; g < groups; g++) {
            const int64_t start = (int64_t(t) * groups + g) * group;
            for (int i = 0; i < group; i += C)
                f(start + i, i, g, int(std::clamp<int64_t>(positions - start - i, 0, std::min(C, group - i))));
        }
    }

    static void read(Square& to, const float* from, int64_t position, int count) {
        std::memcpy(to.v, from + position * C, count * sizeof to.v[0]);
        std::memset(to.v + count, 0, (C - count) * sizeof to.v[0]);
    }

    // Words along the channels, from [position][channel]: rows of channel mixing, features of token mixing.
    void put_channels(const Square& from, int i, int g, Buffer<Word>& rows, Buffer<Word>& features) const {
        Word* to = tokens ? &features[i * RW + g * CW] : &rows[i * CW];
        const int stride = tokens ? RW : CW, count = std::min(C, group - i);
        for (int j = 0; j < count; j++) P::put(to + j * stride, from.v[j], C);
    }
    // Words along the positions, from [channel][position].
    void put_positions(const Square& from, int i, int g, Buffer<Word>& rows, Buffer<Word>& features) const {
        Word* to = (tokens ? &rows[g * C * words] : features.data) + i / PAIR;
        const int stride = tokens ? words : RW, count = std::min(C, group - i);
        for (int c = 0; c < C; c++) P::put(to + c * stride, from.v[c], count);
    }

    void put_normalised(int t, Slice& s) const {
        squares(t, [&](int64_t position, int i, int g, int count) {
            Square x;
            read(x, call.x, position, count);
            x.transpose();
            Norm{x};
            for (int c = 0; c < C; c++)
                for (int j = 0; j < C; j++) x.v[c][j] = j < count ? x.v[c][j] * call.gamma[c] + call.beta[c] : 0;
            if (backward || tokens) put_positions(x, i, g, s.x_rows, s.x_features);
            x.transpose();
            if (backward || !tokens) put_channels(x, i, g, s.x_rows, s.x_features);
        });
    }

    // The product along the units for a square: [channel][position] in token mixing, else [position][channel].
    void get(Square& to, int i, int g, const Slice& s) const {
        for (int a = 0; a < C; a++) {
            const int row = tokens ? g * C + a : i + a, first = tokens ? i : 0;
            for (int b = 0; b < C; b++) {
                const int k = first + b;
                to.v[a][b] = k < wide ? s.y[row * wide + k] : k < features ? s.y_rest[((k - wide) * R + row) * V] : 0;
            }
        }
    }

    // y += units · along, for the group of blocks that ends with this one.
    void add_along_units(int block, const Word* units, Slice& s) const {
        if (block % GROUP < GROUP - 1 && block < blocks - 1) return;
        const int first = block / GROUP * GROUP, along = (block + 1 - first) * BW;
        add_product<P>(units, UW, &weights.along[first * BW * int64_t(wide)], wide, along, s.y.data, wide, R, vectors);
        for (int k = 0; k < rest; k++)
            for (int row = 0; row < R; row++) {
                float* to = &s.y_rest[(k * R + row) * V];
                Vec sum = load(to);
                for (int i = 0; i < along; i += V) {
                    const Word* weight = &weights.rest[((first + i / BW) * rest + k) * int64_t(BW) + i % BW];
                    sum = P::dot(sum, load(units + row * UW + i), load(weight));
                }
                store(to, sum);
            }
    }
    void clear(Slice& s) const { s.y.clear(R * wide), s.y_rest.clear(rest * R * V); }
    void finish(Slice& s) const {
        for (int i = 0; i < rest * R; i++) s.y_rest[i * V] = sum(load(&s.y_rest[i * V]));
    }

    typename P::Keep keep(int t, int row, int block) const {
        if (!drop_hidden.threshold) return P::keep_all();
        const Word pairs = (call.hidden + 1) / 2;
        return P::keep(drop_hidden, Word(int64_t(t) * R + row) * pairs + block * (BLOCK / 2));
    }

    void tile_forward(int t, Slice& s) const {
        put_normalised(t, s);
        clear(s);
        for (int block = 0; block < blocks; block++) {
            for (int row = 0; row < R; row += ROWS) {
                alignas(64) float z[ROWS * BLOCK];
                tile<P, ROWS, 2>(&s.x_rows[row * words], words, &weights.in_units[block * words * int64_t(BLOCK)], BLOCK,
                                 words, z, BLOCK, BIAS, &weights.bias[block * BLOCK]);
                for (int m = 0; m < ROWS; m++) {
                    Vec f[2];
                    for (int n = 0; n < 2; n++) P::gelu(load(&z[m * BLOCK + n * V]), &f[n], nullptr);
                    P::store_units(&s.h_units[(row + m) * UW + block % GROUP * BW], P::pack(f[0], f[1], keep(t, row + m, block)));
                }
            }
            add_along_units(block, s.h_units.data, s);
        }
        finish(s);
        squares(t, [&](int64_t position, int i, int g, int count) {
            Square y;
            get(y, i, g, s);
            if (tokens) y.transpose();
            for (int j = 0; j < count; j++) {
                float factor[C];
                drop_out.channels(position + j, factor);
                const float* x = call.x + (position + j) * C;
                float* out = call.out + (position + j) * C;
                for (int c = 0; c < C; c++) out[c] = x[c] + factor[c] * (y.v[j][c] + call.b2[tokens ? i + j : c]);
            }
        });
    }

    void tile_backward(int t, Slice& s) const {
        put_normalised(t, s);
        squares(t, [&](int64_t position, int i, int g, int count) {
            Square grad;
            read(grad, call.grad, position, count);
            for (int j = 0; j < count; j++) {
                float factor[C];
                drop_out.channels(position + j, factor);
                for (int c = 0; c < C; c++) grad.v[j][c] *= factor[c];
            }
            put_channels(grad, i, g, s.g_rows, s.g_features);
            if (!tokens)
                for (int j = 0; j < C; j++)
                    for (int c = 0; c < C; c++) s.b2[c] += grad.v[j][c];
            grad.transpose();
            put_positions(grad, i, g, s.g_rows, s.g_features);
            if (tokens)
                for (int c = 0; c < C; c++)
                    for (int j = 0; j < C; j++) s.b2[i + j] += grad.v[c][j];
        });
        clear(s);
        for (int block = 0; block < blocks; block++) {
            const int64_t at = block * words * int64_t(BLOCK);
            for (int row = 0; row < R; row += ROWS) {
                alignas(64) float z[ROWS * BLOCK], d[ROWS * BLOCK];
                tile<P, ROWS, 2>(&s.x_rows[row * words], words, &weights.in_units[at], BLOCK, words, z, BLOCK, BIAS,
                                 &weights.bias[block * BLOCK]);
                tile<P, ROWS, 2>(&s.g_rows[row * words], words, &weights.out_units[at], BLOCK, words, d, BLOCK, ZERO,
                                 nullptr);
                Vec b1[2] = {load(&s.b1[block * BLOCK]), load(&s.b1[block * BLOCK + V])};
                for (int m = 0; m < ROWS; m += 2) {
                    typename P::Packed packed[2], d_packed[2];
                    for (int i = 0; i < 2; i++) {
                        const auto kept = keep(t, row + m + i, block);
                        Vec f[2], derivative[2];
                        for (int n = 0; n < 2; n++) {
                            P::gelu(load(&z[(m + i) * BLOCK + n * V]), &f[n], &derivative[n]);
                            derivative[n] *= load(&d[(m + i) * BLOCK + n * V]);
                            b1[n] = P::add(b1[n], derivative[n], kept, n);
                        }
                        packed[i] = P::pack(f[0], f[1], kept), d_packed[i] = P::pack(derivative[0], derivative[1], kept);
                        P::store_units(&s.d_units[(row + m + i) * UW + block % GROUP * BW], d_packed[i]);
                    }
                    P::store_rows(&s.h_rows[(row + m) / PAIR * BLOCK], packed[0], packed[1]);
                    P::store_rows(&s.d_rows[(row + m) / PAIR * BLOCK], d_packed[0], d_packed[1]);
                }
                for (int n = 0; n < 2; n++) store(&s.b1[block * BLOCK + n * V], b1[n]);
            }
            const int64_t sums = block * features * int64_t(BLOCK);
            add_product<P>(s.g_features.data, RW, s.h_rows.data, BLOCK, RW, &s.w2[sums], BLOCK, features, 2);
            add_product<P>(s.x_features.data, RW, s.d_rows.data, BLOCK, RW, &s.w1[sums], BLOCK, features, 2);
            add_along_units(block, s.d_units.data, s);
        }
        finish(s);
        squares(t, [&](int64_t position, int i, int g, int count) {  // LayerNorm's backward pass, and the residual
            Square x, d;
            read(x, call.x, position, count);
            x.transpose();
            const Norm norm{x};
            get(d, i, g, s);
            if (!tokens) d.transpose();
            alignas(64) float mean_d[C] = {}, mean_dx[C] = {};
            for (int c = 0; c < C; c++)
                for (int j = 0; j < C; j++) {
                    s.gamma[c][j] += d.v[c][j] * x.v[c][j], s.beta[c][j] += d.v[c][j];
                    d.v[c][j] *= call.gamma[c];
                    mean_d[j] += d.v[c][j] * (1.f / C), mean_dx[j] += d.v[c][j] * x.v[c][j] * (1.f / C);
                }
            for (int c = 0; c < C; c++)
                for (int j = 0; j < C; j++)
                    d.v[c][j] = norm.scale[j] * (d.v[c][j] - mean_d[j] - x.v[c][j] * mean_dx[j]);
            d.transpose();
            for (int j = 0; j < count; j++)
                for (int c = 0; c < C; c++)
                    call.out[(position + j) * C + c] = call.grad[(position + j) * C + c] + d.v[j][c];
        });
    }

    void reduce(int block) const {
        const int64_t first = int64_t(block) * BLOCK;
        const int there = std::min<int64_t>(BLOCK, call.hidden - first);
        auto sum = [&](Buffer<float> Slice::*part, int64_t at, float* total) {
            for (int h = 0; h < BLOCK; h++) total[h] = (slices[0].*part)[at + h];
            for (int i = 1; i < SLICES; i++)
                for (int h = 0; h < BLOCK; h++) total[h] += (slices[i].*part)[at + h];
        };
        float total[BLOCK];
        sum(&Slice::b1, first, total);
        for (int h = 0; h < there; h++) call.d_b1[first + h] = total[h];
        for (int k = 0; k < features; k++) {
            sum(&Slice::w1, first * features + k * BLOCK, total);
            for (int h = 0; h < there; h++) call.d_w1[(first + h) * features + k] = total[P::lane_of(h)];
            sum(&Slice::w2, first * features + k * BLOCK, total);
            for (int h = 0; h < there; h++)
                call.d_w2[k * call.hidden + first + h] = drop_hidden.scale / P::FS * total[P::lane_of(h)];
        }
    }
    void reduce_rest() const {
        std::fill_n(call.d_b2, features, 0.f), std::fill_n(call.d_gamma, C, 0.f), std::fill_n(call.d_beta, C, 0.f);
        for (const Slice& s : slices) {
            for (int k = 0; k < features; k++) call.d_b2[k] += s.b2[k];
            for (int c = 0; c < C; c++)
                for (int i = 0; i < C; i++) call.d_gamma[c] += s.gamma[c][i], call.d_beta[c] += s.beta[c][i];
        }
    }
};

std::mutex one_call;  // the buffers are shared

}  // namespace

extern "C" int mixing_has_bfloat16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// gelu and its derivative, as a tile computes them: for the tests. `count` is a multiple of V.
template <class P>
void gelu(const float* z, float* value, float* derivative, int64_t count) {
    for (int64_t i = 0; i < count; i += V) {
        Vec f, d;
        P::gelu(P::ZS * load(z + i), &f, &d);
        store(value + i, f / P::FS), store(derivative + i, d / P::DS);
    }
}

extern "C" void mixing_gelu(const float* z, float* value, float* derivative, int64_t count, int bfloat16) {
#if defined(__AVX512BF16__)
    if (bfloat16) return gelu<Bfloat16>(z, value, derivative, count);
#endif
    gelu<Float32>(z, value, derivative, count);
}

extern "C" void mixing_run(const Call* call, int bfloat16, int backward) {
    std::lock_guard<std::mutex> lock(one_call);
#if defined(__AVX512BF16__)
    if (bfloat16) return Mixing<Bfloat16>(*call, backward).run();
#endif
    Mixing<Float32>(*call, backward).run();
}
