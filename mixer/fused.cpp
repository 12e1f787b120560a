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
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>
#if defined(__AVX512BF16__)
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
constexpr int R = 64;         // rows in a tile
constexpr int BLOCK = 2 * V;  // hidden units in a block
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
    const int most = vectors == 1 ? 2 * ROWS : ROWS, parts = (rows + most - 1) / most;
    for (int part = 0; part < parts; part++) {
        const int m = rows * part / parts, count = rows * (part + 1) / parts - m;
        for (int n = 0; n < vectors;) {
            const int left = vectors - n, width = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
            auto run = width == 3 ? tile_of<P, ROWS, 3> : width == 2 ? tile_of<P, ROWS, 2> : tile_of<P, 2 * ROWS, 1>;
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

// ---------------------------------------------------------------- one call

struct Call {  // what fused.py passes
    const float *x, *gamma, *beta, *w1, *b1, *w2, *b2, *grad;
    float *out, *d_gamma, *d_beta, *d_w1, *d_b1, *d_w2, *d_b2;  // out is d_x in the backward pass
    const int64_t* seed;
    int64_t batch, patches, hidden;
    int32_t over_patches, threshold, threads;
};

template <class P>
class Mixing {
    static constexpr int PAIR = P::PAIR, RW = R / PAIR, BW = BLOCK / PAIR, CW = C / PAIR;

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

    // Weights as words. in_units, out_units [block][word of features][unit]: for products along the features;
    // along_units [block][word of units][feature], rest_units [block][feature][word of units]: along the units.
    std::vector<Word> in_units, out_units, along_units, rest_units;
    std::vector<float> bias;

    struct Sums {  // of the weight gradients over a slice
        std::vector<float> w1, w2, b1, b2;  // [block][feature][lane], [block][lane], [feature]
        float gamma[C] = {}, beta[C] = {};
    };
    std::vector<Sums> sums{SLICES};

    // A tile's data. *_rows [row][word of features], *_features [feature][word of rows].
    struct Work {
        std::vector<Word> x_rows, x_features, g_rows, g_features, h_units, h_rows, d_units, d_rows;
        std::vector<float> y, y_rest, z, d, natural;
    };

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
        pack();
        parallel(SLICES, call.threads, [&](int slice) {
            const int first = int64_t(tiles) * slice / SLICES, last = int64_t(tiles) * (slice + 1) / SLICES;
            Work w = workspace();
            if (backward) {
                Sums& s = sums[slice];
                s.w1.assign(int64_t(blocks) * BLOCK * features, 0), s.w2 = s.w1;
                s.b1.assign(blocks * BLOCK, 0), s.b2.assign(features, 0);
            }
            for (int t = first; t < last; t++) backward ? tile_backward(t, w, sums[slice]) : tile_forward(t, w);
        });
        if (backward) reduce();
    }

   private:
    void pack() {
        const float keep = drop_hidden.scale;
        bias.assign(blocks * BLOCK, 0);
        for (int h = 0; h < call.hidden; h++) bias[h] = P::ZS * call.b1[h];
        in_units.resize(int64_t(blocks) * words * BLOCK);
        out_units.resize(backward ? in_units.size() : 0);
        along_units.assign(int64_t(blocks) * BW * wide, 0);
        rest_units.resize(int64_t(blocks) * rest * BW);
        parallel(blocks, call.threads, [&](int block) {
            const int64_t hidden = call.hidden, first = int64_t(block) * BLOCK;
            auto w1 = [&](int h, int k) {
                return first + h < hidden && k < features ? call.w1[(first + h) * features + k] : 0.f;
            };
            auto w2 = [&](int h, int k) {
                return first + h < hidden && k < features ? call.w2[k * hidden + first + h] : 0.f;
            };
            auto along_features = [&](Word* to, auto weight, float scale) {
                for (int w = 0; w < words; w++)
                    for (int h = 0; h < BLOCK; h++)
                        to[w * BLOCK + h] = P::word(scale * weight(h, PAIR * w), scale * weight(h, PAIR * w + 1));
            };
            auto along = [&](Word* to, Word* to_rest, auto weight, float scale) {
                for (int w = 0; w < BW; w++)
                    for (int k = 0; k < features; k++)
                        (k < wide ? to[w * wide + k] : to_rest[(k - wide) * BW + w]) =
                            P::word(scale * weight(PAIR * w, k), scale * weight(PAIR * w + PAIR - 1, k));
            };
            Word *a = &along_units[int64_t(block) * BW * wide], *r = rest_units.data() + int64_t(block) * rest * BW;
            along_features(&in_units[int64_t(block) * words * BLOCK], w1, P::ZS);
            if (backward) {
                along_features(&out_units[int64_t(block) * words * BLOCK], w2, keep / P::DS);
                along(a, r, w1, 1);
            } else {
                along(a, r, w2, keep / P::FS);
            }
        });
    }

    Work workspace() const {
        Work w;
        w.x_rows.resize(R * words), w.y.resize(R * wide), w.y_rest.resize(rest * R * V);
        w.h_units.resize(R * BW), w.z.resize(ROWS * BLOCK), w.natural.resize((group + 1) * C);
        if (backward) {
            w.g_rows.resize(R * words), w.x_features.resize(features * RW), w.g_features.resize(features * RW);
            w.h_rows.resize(RW * BLOCK), w.d_units.resize(R * BW), w.d_rows.resize(RW * BLOCK);
            w.d.resize(ROWS * BLOCK);
        }
        return w;
    }

    // The first position of a group and how many of the group there are.
    int64_t start(int t, int g) const { return (int64_t(t) * groups + g) * group; }
    int present(int t, int g) const { return std::clamp<int64_t>(positions - start(t, g), 0, group); }

    static void layer_norm(const float* x, float* mean, float* scale) {
        Vec s{}, q{};
        for (int c = 0; c < C; c += V) s += load(x + c);
        *mean = sum(s) / C;
        for (int c = 0; c < C; c += V) q += (load(x + c) - *mean) * (load(x + c) - *mean);
        *scale = 1 / std::sqrt(sum(q) / C + 1e-6f);
    }

    // A group's values [position][channel], zeros where there are none, as words in both directions.
    template <class Value>
    void lay_out(int t, int g, Work& w, std::vector<Word>& rows, std::vector<Word>& feats, Value value) const {
        const int count = present(t, g), padded = group + group % PAIR;
        float* v = w.natural.data();
        for (int i = 0; i < count; i++) value(start(t, g) + i, i, v + i * C);
        std::fill(v + count * C, v + padded * C, 0.f);
        // Along the channels: the rows of channel mixing, the features of token mixing.
        if (backward || !tokens) {
            Word* to = tokens ? &feats[g * CW] : rows.data();
            const int stride = tokens ? RW : words;
            for (int i = 0; i < group; i++)
                for (int c = 0; c < CW; c++) to[i * stride + c] = P::word(v[i * C + c * PAIR], v[i * C + c * PAIR + PAIR - 1]);
        }
        if (backward || tokens) {
            Word* to = tokens ? &rows[g * C * words] : feats.data();
            const int stride = tokens ? words : RW;
            for (int j = 0; j < padded / PAIR; j++)
                for (int c = 0; c < C; c++)
                    to[c * stride + j] = P::word(v[j * PAIR * C + c], v[(j * PAIR + PAIR - 1) * C + c]);
        }
    }

    void normalised(int t, Work& w) const {
        for (int g = 0; g < groups; g++)
            lay_out(t, g, w, w.x_rows, w.x_features, [&](int64_t position, int, float* to) {
                const float* x = call.x + position * C;
                float mean, scale;
                layer_norm(x, &mean, &scale);
                for (int c = 0; c < C; c++) to[c] = (x[c] - mean) * scale * call.gamma[c] + call.beta[c];
            });
    }

    // The row of a tile that holds a channel of a position, and its feature there.
    float& at(Work& w, int g, int i, int c) const {
        const int row = tokens ? g * C + c : i, feature = tokens ? i : c;
        return feature < wide ? w.y[row * wide + feature] : w.y_rest[((feature - wide) * R + row) * V];
    }

    // y += units · along_units, for a block.
    void add_along_units(int block, const Word* units, Work& w) const {
        add_product<P>(units, BW, &along_units[int64_t(block) * BW * wide], wide, BW, w.y.data(), wide, R, vectors);
        for (int k = 0; k < rest; k++)
            for (int row = 0; row < R; row++) {
                float* to = &w.y_rest[(k * R + row) * V];
                Vec s = load(to);
                for (int i = 0; i < BW; i += V)
                    s = P::dot(s, load(units + row * BW + i), load(&rest_units[(int64_t(block) * rest + k) * BW + i]));
                store(to, s);
            }
    }
    void clear(Work& w) const {
        std::fill(w.y.begin(), w.y.end(), 0.f), std::fill(w.y_rest.begin(), w.y_rest.end(), 0.f);
    }
    void finish(Work& w) const {
        for (int i = 0; i < rest * R; i++) w.y_rest[i * V] = sum(load(&w.y_rest[i * V]));
    }

    typename P::Keep keep(int t, int row, int block) const {
        if (!drop_hidden.threshold) return P::keep_all();
        const Word pairs = (call.hidden + 1) / 2;
        return P::keep(drop_hidden, Word(int64_t(t) * R + row) * pairs + block * (BLOCK / 2));
    }

    void tile_forward(int t, Work& w) const {
        normalised(t, w);
        clear(w);
        for (int block = 0; block < blocks; block++) {
            for (int row = 0; row < R; row += ROWS) {
                tile<P, ROWS, 2>(&w.x_rows[row * words], words, &in_units[int64_t(block) * words * BLOCK], BLOCK, words,
                                 w.z.data(), BLOCK, BIAS, &bias[block * BLOCK]);
                for (int m = 0; m < ROWS; m++) {
                    Vec f[2];
                    for (int n = 0; n < 2; n++) P::gelu(load(&w.z[m * BLOCK + n * V]), &f[n], nullptr);
                    P::store_units(&w.h_units[(row + m) * BW], P::pack(f[0], f[1], keep(t, row + m, block)));
                }
            }
            add_along_units(block, w.h_units.data(), w);
        }
        finish(w);
        for (int g = 0; g < groups; g++)
            for (int i = 0; i < present(t, g); i++) {
                const int64_t position = start(t, g) + i;
                float factor[C];
                drop_out.channels(position, factor);
                for (int c = 0; c < C; c++)
                    call.out[position * C + c] = call.x[position * C + c] +
                                                 factor[c] * (at(w, g, i, c) + call.b2[tokens ? i : c]);
            }
    }

    void tile_backward(int t, Work& w, Sums& s) const {
        normalised(t, w);
        for (int g = 0; g < groups; g++)
            lay_out(t, g, w, w.g_rows, w.g_features, [&](int64_t position, int i, float* to) {
                float factor[C];
                drop_out.channels(position, factor);
                for (int c = 0; c < C; c++) {
                    to[c] = call.grad[position * C + c] * factor[c];
                    s.b2[tokens ? i : c] += to[c];
                }
            });
        clear(w);
        for (int block = 0; block < blocks; block++) {
            const int64_t weights = int64_t(block) * words * BLOCK;
            for (int row = 0; row < R; row += ROWS) {
                tile<P, ROWS, 2>(&w.x_rows[row * words], words, &in_units[weights], BLOCK, words, w.z.data(), BLOCK, BIAS,
                                 &bias[block * BLOCK]);
                tile<P, ROWS, 2>(&w.g_rows[row * words], words, &out_units[weights], BLOCK, words, w.d.data(), BLOCK, ZERO,
                                 nullptr);
                Vec b1[2] = {load(&s.b1[block * BLOCK]), load(&s.b1[block * BLOCK + V])};
                for (int m = 0; m < ROWS; m += 2) {
                    typename P::Packed h[2], d[2];
                    for (int i = 0; i < 2; i++) {
                        const auto kept = keep(t, row + m + i, block);
                        Vec f[2], derivative[2];
                        for (int n = 0; n < 2; n++) {
                            P::gelu(load(&w.z[(m + i) * BLOCK + n * V]), &f[n], &derivative[n]);
                            derivative[n] *= load(&w.d[(m + i) * BLOCK + n * V]);
                            b1[n] = P::add(b1[n], derivative[n], kept, n);
                        }
                        h[i] = P::pack(f[0], f[1], kept), d[i] = P::pack(derivative[0], derivative[1], kept);
                        P::store_units(&w.d_units[(row + m + i) * BW], d[i]);
                    }
                    P::store_rows(&w.h_rows[(row + m) / PAIR * BLOCK], h[0], h[1]);
                    P::store_rows(&w.d_rows[(row + m) / PAIR * BLOCK], d[0], d[1]);
                }
                for (int n = 0; n < 2; n++) store(&s.b1[block * BLOCK + n * V], b1[n]);
            }
            const int64_t sums_at = int64_t(block) * BLOCK * features;
            add_product<P>(w.g_features.data(), RW, w.h_rows.data(), BLOCK, RW, &s.w2[sums_at], BLOCK, features, 2);
            add_product<P>(w.x_features.data(), RW, w.d_rows.data(), BLOCK, RW, &s.w1[sums_at], BLOCK, features, 2);
            add_along_units(block, w.d_units.data(), w);
        }
        finish(w);
        layer_norm_backward(t, w, s);
    }

    void layer_norm_backward(int t, Work& w, Sums& s) const {
        for (int g = 0; g < groups; g++)
            for (int i = 0; i < present(t, g); i++) {
                const int64_t position = start(t, g) + i;
                const float *x = call.x + position * C, *grad = call.grad + position * C;
                float mean, scale, unit[C], d[C];
                layer_norm(x, &mean, &scale);
                Vec sum_d{}, sum_dx{};
                for (int c = 0; c < C; c++) {
                    unit[c] = (x[c] - mean) * scale, d[c] = at(w, g, i, c);
                    s.gamma[c] += d[c] * unit[c], s.beta[c] += d[c];
                    d[c] *= call.gamma[c];
                }
                for (int c = 0; c < C; c += V) sum_d += load(d + c), sum_dx += load(d + c) * load(unit + c);
                const float mean_d = sum(sum_d) / C, mean_dx = sum(sum_dx) / C;
                for (int c = 0; c < C; c++)
                    call.out[position * C + c] = grad[c] + scale * (d[c] - mean_d - unit[c] * mean_dx);
            }
    }

    void reduce() {
        const float keep = drop_hidden.scale;
        parallel(blocks, call.threads, [&](int block) {
            const int64_t first = int64_t(block) * BLOCK, at = first * features;
            for (int slice = 1; slice < SLICES; slice++) {
                const Sums& s = sums[slice];
                for (int i = 0; i < features * BLOCK; i++) sums[0].w1[at + i] += s.w1[at + i];
                for (int i = 0; i < features * BLOCK; i++) sums[0].w2[at + i] += s.w2[at + i];
                for (int i = 0; i < BLOCK; i++) sums[0].b1[first + i] += s.b1[first + i];
            }
            for (int h = 0; h < BLOCK && first + h < call.hidden; h++) {
                call.d_b1[first + h] = sums[0].b1[first + h];
                for (int k = 0; k < features; k++) {
                    const int64_t from = at + k * BLOCK + P::lane_of(h);
                    call.d_w1[(first + h) * features + k] = sums[0].w1[from];
                    call.d_w2[k * call.hidden + first + h] = keep / P::FS * sums[0].w2[from];
                }
            }
        });
        for (const Sums& s : sums) {
            for (int k = 0; k < features; k++) call.d_b2[k] = (&s == &sums[0] ? 0 : call.d_b2[k]) + s.b2[k];
            for (int c = 0; c < C; c++) {
                call.d_gamma[c] = (&s == &sums[0] ? 0 : call.d_gamma[c]) + s.gamma[c];
                call.d_beta[c] = (&s == &sums[0] ? 0 : call.d_beta[c]) + s.beta[c];
            }
        }
    }
};

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
#if defined(__AVX512BF16__)
    if (bfloat16) return Mixing<Bfloat16>(*call, backward).run();
#endif
    Mixing<Float32>(*call, backward).run();
}
