// One block of models/conv4.py, convolution, batch normalisation, ReLU and maybe 2 x 2 max pooling, of many tasks at once, and its first
// and second derivatives: the formulas of models/convolution.py, a task at a time, so that what one pass writes the next finds in
// the cache. models/native.py compiles and calls it.
//
//   x [n, h, w, C]   weight [O, 3, 3, C]   z [n, h', w', O]   a [n, h', w', O], or pooled [n, h'/2, w'/2, O]
//
// O is a multiple of a vector. So is C, but in the block that takes data: of x no derivative is wanted then.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int BYTES = 64, WIDE = 4;  // of a vector; vectors in a tile's row
#elif defined(__AVX2__)
constexpr int BYTES = 32, WIDE = 2;
#else
constexpr int BYTES = 16, WIDE = 4;
#endif
constexpr int ROWS = 6;  // of a tile: with WIDE vectors each, as many sums as there are registers
constexpr int SQUARES = 48;  // of outputs at a time: what they see and their products stay in the second cache
constexpr int PAIRS = 72;  // rows of dz and of x that stay in the first cache while all their products are summed

namespace {

template <class T> struct Vector {
    typedef T type __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using V = typename Vector<T>::type;
template <class T> using Mask = decltype(V<T>{} > V<T>{});
template <class T> constexpr int LANES = BYTES / sizeof(T);

template <class T> inline V<T> load(const T* p) { return *reinterpret_cast<const V<T>*>(p); }
template <class T> inline void store(T* p, V<T> v) { *reinterpret_cast<V<T>*>(p) = v; }
template <class T> inline void add(T* p, V<T> v) { store(p, load(p) + v); }
template <class T> inline V<T> every(T value) { return value - V<T>{}; }

// Vectors in a tile's row of `size` numbers: the most, up to WIDE, that divide it.
template <class T> int vectors(long size) {
    int count = WIDE;
    while (size % (count * LANES<T>)) count--;
    return count;
}

// Memory that begins where a vector does: one across two lines of the cache costs twice.
template <class T> class Memory {
    T* at = nullptr;
    size_t size = 0;

  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { std::free(at); }
    T* room(size_t wanted) {
        if (wanted > size) {
            std::free(at);
            size = (wanted + LANES<T> - 1) / LANES<T> * LANES<T>;
            at = static_cast<T*>(std::aligned_alloc(BYTES, size * sizeof(T)));
            if (!at) throw std::bad_alloc();
        }
        return at;
    }
};

struct Shape {
    long n, h, w, C, rows, cols, O;  // x [n, h, w, C], z [n, rows, cols, O]
    int stride;
    bool pooled;
    long positions() const { return n * rows * cols; }
    long image() const { return h * w * C; }
    long z_image() const { return rows * cols * O; }
    // Whether the products are taken by squares of outputs, 16 for each: where they are less than three quarters of those by taps. On
    // small maps too much of a square lies outside.
    bool by_squares() const {
        const long squares = ((rows + 1) / 2) * ((cols + 1) / 2), taps = (3 * rows - 2) * (3 * cols - 2);
        return stride == 1 && 4 * 16 * squares < 3 * taps;
    }
};

// The convolution's three products are sums over the taps of its window.

// Where an output's input lies in x, tap by tap; -1 on the border.
inline long input(const Shape& s, long row, long col, int tap) {
    const long y = row * s.stride + tap / 3 - 1, x = col * s.stride + tap % 3 - 1;
    return y < 0 || y >= s.h || x < 0 || x >= s.w ? -1 : (y * s.w + x) * s.C;
}

template <class T> struct Pair {
    const T *a, *b;
};

// A thread's memory.
template <class T> struct Work {
    Memory<T> turned, other_turned, seen, squares, square_sums, nothing, dz, sums, bordered, patches, y;
    std::vector<Pair<T>> lines;
    const T* zeros(long count) {
        T* to = nothing.room(count);
        std::fill(to, to + count, T(0));
        return to;
    }
};

// out[i, :] = sum over taps and k of a[i, k] b[k, :], for M images whose parts lie `apart`.
template <class T, int M, int NV>
void tile(const Pair<T>* taps, int count, long apart, long K, long ldb, T* out, long out_apart) {
    V<T> sums[M][NV];  // unrolled from the first to the last: else the compiler keeps them in memory
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) sums[i][j] = V<T>{};
    for (int t = 0; t < count; t++) {
        const T *a = taps[t].a, *b = taps[t].b;
        for (long k = 0; k < K; k++, b += ldb) {
            V<T> right[NV];
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) right[j] = load(b + j * LANES<T>);
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                const V<T> left = every(a[i * apart + k]);
#pragma GCC unroll 8
                for (int j = 0; j < NV; j++) sums[i][j] += left * right[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) store(out + i * out_apart + j * LANES<T>, sums[i][j]);
}

// f(M, NV) with so many rows and vectors as constants: a pointer to what is made for them.
template <int NV, class F> auto sized(long rows, F f) {
    constexpr std::integral_constant<int, NV> vectors;
    switch (rows) {
        case 1: return f(std::integral_constant<int, 1>(), vectors);
        case 2: return f(std::integral_constant<int, 2>(), vectors);
        case 3: return f(std::integral_constant<int, 3>(), vectors);
        case 4: return f(std::integral_constant<int, 4>(), vectors);
        case 5: return f(std::integral_constant<int, 5>(), vectors);
        default: return f(std::integral_constant<int, ROWS>(), vectors);
    }
}

template <class F> auto sized(long rows, int wide, F f) {
    switch (wide) {
        case 4: return sized<4>(rows, f);
        case 3: return sized<3>(rows, f);
        case 2: return sized<2>(rows, f);
        default: return sized<1>(rows, f);
    }
}

template <class T> auto tile_of(long rows, int wide) {
    return sized(rows, wide, [](auto M, auto NV) { return &tile<T, M, NV>; });
}

// f(first, next) for as few groups of at most so many as there can be, of nearly one size.
template <class F> void in_groups(long count, long most, F f) {
    const long groups = (count + most - 1) / most;
    for (long g = 0; g < groups; g++) f(g * count / groups, (g + 1) * count / groups);
}

// out [rows, width] = sum over pairs of a [rows, K], rows `apart`, with b [K, width].
template <class T> void matrix_product(const Pair<T>* pairs, int count, long rows, long apart, long K, long width, T* out) {
    const int wide = vectors<T>(width);
    in_groups(rows, ROWS, [&](long first, long next) {
        const auto sum = tile_of<T>(next - first, wide);
        for (long column = 0; column < width; column += wide * LANES<T>) {
            Pair<T> part[2];
            for (int p = 0; p < count; p++) part[p] = {pairs[p].a + first * apart, pairs[p].b + column};
            sum(part, count, apart, K, width, out + first * width + column, width);
        }
    });
}

// A tile holds one position of several images: all have the same taps there, and those on the border cost nothing.
// done(image, row) follows as soon as all of a row's outputs stand there.
template <class T, class F, class G>
void by_tiles(long n, long rows, long cols, long apart, long K, long ldb, long width, T* out, F taps_at, G done) {
    const int wide = vectors<T>(width);
    in_groups(n, ROWS, [&](long first, long next) {
        const auto sum = tile_of<T>(next - first, wide);
        for (long row = 0; row < rows; row++) {
            for (long col = 0; col < cols; col++) {
                Pair<T> taps[18];  // of two pairs
                const int count = taps_at(row, col, taps);
                for (int t = 0; t < count; t++) taps[t].a += first * apart;
                T* to = out + ((first * rows + row) * cols + col) * width;  // far away: asked for before it is written
                for (long i = 0; i < next - first; i++)
                    for (long k = 0; k < width; k += 64 / sizeof(T)) __builtin_prefetch(to + i * rows * cols * width + k, 1);
                for (long column = 0; column < width; column += wide * LANES<T>) {
                    sum(taps, count, apart, K, ldb, to + column, rows * cols * width);
                    for (int t = 0; t < count; t++) taps[t].b += wide * LANES<T>;
                }
            }
            for (long i = first; i < next; i++) done(i, row);
        }
    });
}

// With stride 1, Winograd's F(2 x 2, 3 x 3) (Lavin, Gray 2016, "Fast algorithms for convolutional neural networks"): a square of four
// outputs takes 16 products of its 4 x 4 inputs and of the weight, both transformed, instead of 36. Each transform is a small
// matrix from both sides: a function of columns, and then of rows.

template <class T> inline void to_input(V<T> a, V<T> b, V<T> c, V<T> d, V<T>* to) {
    to[0] = a - c, to[1] = b + c, to[2] = c - b, to[3] = b - d;
}
template <class T> inline void to_output(V<T> a, V<T> b, V<T> c, V<T> d, V<T>* to) { to[0] = a + b + c, to[1] = b - c - d; }
template <class T> inline void from_output(V<T> a, V<T> b, V<T>* to) { to[0] = a, to[1] = a + b, to[2] = a - b, to[3] = -b; }
template <class T> inline void to_weight(V<T> a, V<T> b, V<T> c, V<T>* to) {
    to[0] = a, to[1] = (a + b + c) / T(2), to[2] = (a - b + c) / T(2), to[3] = c;
}
template <class T> inline void from_weight(V<T> a, V<T> b, V<T> c, V<T> d, V<T>* to) {
    to[0] = a + (b + c) / T(2), to[1] = (b - c) / T(2), to[2] = (b + c) / T(2) + d;
}

// to [16, count], from the 9 taps of each vector.
template <class T, class F> void transformed_weight(long count, F tap, T* to) {
    for (long at = 0; at < count; at += LANES<T>) {
        V<T> half[3][4], whole[4];
        for (int j = 0; j < 3; j++) to_weight<T>(tap(j, at), tap(3 + j, at), tap(6 + j, at), half[j]);
        for (int i = 0; i < 4; i++) {
            to_weight<T>(half[0][i], half[1][i], half[2][i], whole);
            for (int j = 0; j < 4; j++) store(to + (4 * i + j) * count + at, whole[j]);
        }
    }
}

// The derivative: to [O, 9, C], from that of the transformed weight [16, O, C].
template <class T> void untransformed_weight(const T* from, long O, long C, T* to) {
    const long count = O * C;
    for (long at = 0; at < count; at += LANES<T>) {
        auto in = [=](int i, int j) { return load(from + (4 * i + j) * count + at); };
        V<T> half[4][3], whole[3];
        for (int j = 0; j < 4; j++) from_weight<T>(in(0, j), in(1, j), in(2, j), in(3, j), half[j]);
        for (int i = 0; i < 3; i++) {
            from_weight<T>(half[0][i], half[1][i], half[2][i], half[3][i], whole);
            for (int j = 0; j < 3; j++) store(to + (at / C * 9 + 3 * i + j) * C + at % C, whole[j]);
        }
    }
}

// Some strips of squares, two rows of a map each, out of those of n maps [rows, cols].
struct Strips {
    long rows, cols, first, next;
    long squares() const { return (cols + 1) / 2; }  // of a strip
    long all() const { return (next - first) * squares(); }
    // f(which of all squares its first is, map, row) for each.
    template <class F> void each(F f) const {
        const long strips = (rows + 1) / 2;
        for (long strip = first; strip < next; strip++) f((strip - first) * squares(), strip / strips, strip % strips * 2);
    }
    template <class F> static void of(long n, long rows, long cols, F f) {
        in_groups(n * ((rows + 1) / 2), std::max(1L, SQUARES / ((cols + 1) / 2)), [&](long first, long next) {
            f(Strips{rows, cols, first, next});
        });
    }
};

// to [16, squares, K], of inputs x [n, rows, cols, K]; `zeros` stand for what lies outside.
template <class T> void transformed_input(const Strips& s, const T* x, long K, const T* zeros, T* to) {
    const long apart = s.all() * K, cols = s.cols;
    s.each([=](long first, long map, long row) {
        const T *rows[4], *at[4][4];
        for (long i = 0, y = row - 1; i < 4; i++, y++) rows[i] = y < 0 || y >= s.rows ? nullptr : x + (map * s.rows + y) * cols * K;
        for (long col = 0, square = first * K; col < cols; col += 2, square += K) {
            for (int j = 0; j < 4; j++) {
                const long left = col + j - 1;
                for (int i = 0; i < 4; i++) at[i][j] = rows[i] && left >= 0 && left < cols ? rows[i] + left * K : zeros;
            }
            for (long k = 0; k < K; k += LANES<T>) {
                V<T> half[4][4], whole[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    to_input<T>(load(at[0][j] + k), load(at[1][j] + k), load(at[2][j] + k), load(at[3][j] + k), half[j]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    to_input<T>(half[0][i], half[1][i], half[2][i], half[3][i], whole);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) store(to + square + (4 * i + j) * apart + k, whole[j]);
                }
            }
        }
    });
}

// out [n, rows, cols, K], from the squares' products [16, squares, K].
template <class T> void transformed_output(const Strips& s, const T* from, long K, T* out) {
    const long apart = s.all() * K, cols = s.cols;
    s.each([=](long first, long map, long row) {
        T* to = out + (map * s.rows + row) * cols * K;
        const bool second = row + 1 < s.rows;
        for (long col = 0, square = first * K; col < cols; col += 2, square += K)
            for (long k = 0; k < K; k += LANES<T>) {
                V<T> half[4][2], whole[2];
                auto in = [=](int i, int j) { return load(from + square + (4 * i + j) * apart + k); };
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) to_output<T>(in(0, j), in(1, j), in(2, j), in(3, j), half[j]);
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    if (i && !second) break;
                    to_output<T>(half[0][i], half[1][i], half[2][i], half[3][i], whole);
                    T* at = to + (i * cols + col) * K + k;
                    store(at, whole[0]);
                    if (col + 1 < cols) store(at + K, whole[1]);
                }
            }
    });
}

// The derivative: to [16, squares, K], from that of out.
template <class T> void untransformed_output(const Strips& s, const T* out, long K, const T* zeros, T* to) {
    const long apart = s.all() * K, cols = s.cols;
    s.each([=](long first, long map, long row) {
        const T *upper = out + (map * s.rows + row) * cols * K, *lower = row + 1 < s.rows ? upper + cols * K : zeros;
        for (long col = 0, square = first * K; col < cols; col += 2, square += K)
            for (long k = 0; k < K; k += LANES<T>) {
                V<T> half[2][4] = {}, whole[4];
                for (int j = 0; j < 2; j++)
                    if (const long at = (col + j) * K + k; col + j < cols) from_output<T>(load(upper + at), load(lower + at), half[j]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    from_output<T>(half[0][i], half[1][i], whole);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) store(to + square + (4 * i + j) * apart + k, whole[j]);
                }
            }
    });
}

// As `by_tiles`, of pairs of inputs [n, rows, cols, K] with transformed weights [16, K, width].
template <class T, class G>
void by_squares(long n, long rows, long cols, long K, long width, const Pair<T>* pairs, int count, T* out, Work<T>& work, G done) {
    const T* zeros = work.zeros(K);
    Strips::of(n, rows, cols, [&](const Strips& s) {
        const long all = s.all(), each = 16 * all * K;
        T *seen = work.seen.room(count * each), *products = work.squares.room(16 * all * width);
        for (int p = 0; p < count; p++) transformed_input(s, pairs[p].a, K, zeros, seen + p * each);
        for (long u = 0; u < 16; u++) {
            Pair<T> parts[2];
            for (int p = 0; p < count; p++) parts[p] = {seen + p * each + u * all * K, pairs[p].b + u * K * width};
            matrix_product(parts, count, all, K, K, width, products + u * all * width);
        }
        transformed_output(s, products, width, out);
        s.each([&](long, long map, long row) {
            for (long r = row; r < std::min(row + 2, rows); r++) done(map, r);
        });
    });
}

// z = sum over pairs of x with a weight that is `turned`.
template <class T, class G> void product(const Shape& s, const Pair<T>* pairs, int count, T* z, Work<T>& work, G done) {
    if (s.by_squares()) return by_squares(s.n, s.rows, s.cols, s.C, s.O, pairs, count, z, work, done);
    by_tiles<T>(s.n, s.rows, s.cols, s.image(), s.C, s.O, s.O, z, [&](long row, long col, Pair<T>* taps) {
        int held = 0;
        for (int p = 0; p < count; p++)
            for (int t = 0; t < 9; t++) {
                const long at = input(s, row, col, t);
                if (at >= 0) taps[held++] = {pairs[p].a + at, pairs[p].b + t * s.C * s.O};
            }
        return held;
    }, done);
}

// dx: dz with the weight.
template <class T> void product_on_x(const Shape& s, const T* dz, const T* weight, T* dx, Work<T>& work) {
    if (s.by_squares()) {
        T* to = work.turned.room(16 * s.C * s.O);
        transformed_weight<T>(s.O * s.C, [&](int t, long at) {
            return load(weight + (at / s.C * 9 + 8 - t) * s.C + at % s.C);
        }, to);
        const Pair<T> pair{dz, to};
        return by_squares(s.n, s.h, s.w, s.O, s.C, &pair, 1, dx, work, [](long, long) {});
    }
    by_tiles<T>(s.n, s.h, s.w, s.z_image(), s.O, 9 * s.C, s.C, dx, [&](long y, long x, Pair<T>* taps) {
        int held = 0;
        for (int t = 0; t < 9; t++) {
            const long row = y + 1 - t / 3, col = x + 1 - t % 3;
            if (row < 0 || col < 0 || row % s.stride || col % s.stride) continue;
            if (row / s.stride >= s.rows || col / s.stride >= s.cols) continue;
            taps[held++] = {dz + (row / s.stride * s.cols + col / s.stride) * s.O, weight + t * s.C};
        }
        return held;
    }, [](long, long) {});
}

// weight[i, :] += sum over pairs of a[i] b[:], i < M.
template <class T, int M, int NV> void outer(const Pair<T>* pairs, int count, long i0, long j0, T* weight, long apart) {
    V<T> sums[M][NV];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) sums[i][j] = load(weight + (i0 + i) * apart + j0 + j * LANES<T>);
    for (int p = 0; p < count; p++) {
        const T *a = pairs[p].a + i0, *b = pairs[p].b + j0;
        V<T> right[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) right[j] = load(b + j * LANES<T>);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const V<T> left = every(a[i]);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) sums[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) store(weight + (i0 + i) * apart + j0 + j * LANES<T>, sums[i][j]);
}

// weight [height, width], rows `apart`: += sum over pairs of a [height] with b [width].
template <class T> void outers(const Pair<T>* pairs, int count, long height, long width, T* weight, long apart) {
    const int wide = vectors<T>(width);
    in_groups(height, ROWS, [&](long first, long next) {
        const auto sum = sized(next - first, wide, [](auto M, auto NV) { return &outer<T, M, NV>; });
        for (long column = 0; column < width; column += wide * LANES<T>) sum(pairs, count, first, column, weight, apart);
    });
}

// `product_on_weight` by squares: of each of the 16 parts of a transformed weight, the products of all squares.
template <class T> void squares_on_weight(const Shape& shape, const T* dz, const T* x, T* dweight, Work<T>& work) {
    const long C = shape.C, O = shape.O;
    const T* zeros = work.zeros(shape.cols * std::max(C, O));
    T* sums = work.square_sums.room(16 * O * C);
    std::fill(sums, sums + 16 * O * C, T(0));
    Strips::of(shape.n, shape.rows, shape.cols, [&](const Strips& s) {
        const long all = s.all();
        T *seen = work.seen.room(16 * all * C), *squares = work.squares.room(16 * all * O);
        transformed_input(s, x, C, zeros, seen);
        untransformed_output(s, dz, O, zeros, squares);
        work.lines.resize(all);
        for (long u = 0; u < 16; u++) {
            for (long k = 0; k < all; k++) work.lines[k] = {squares + (u * all + k) * O, seen + (u * all + k) * C};
            outers(work.lines.data(), all, O, C, sums + u * O * C, C);
        }
    });
    untransformed_weight(sums, O, C, dweight);
}

// d weight: dz with x.
template <class T> void product_on_weight(const Shape& s, const T* dz, const T* x, T* dweight, Work<T>& work) {
    if (s.by_squares()) return squares_on_weight(s, dz, x, dweight, work);
    std::vector<Pair<T>>& lines = work.lines;
    const long step = std::max(1L, PAIRS / (s.n * s.cols));
    std::fill(dweight, dweight + 9 * s.C * s.O, T(0));
    lines.resize(step * s.n * s.cols);
    for (long first = 0; first < s.rows; first += step)  // what fits the second cache, for all taps
        for (int t = 0; t < 9; t++) {
            long held = 0;
            for (long row = first; row < std::min(first + step, s.rows); row++) {
                const long y = row * s.stride + t / 3 - 1, left = t % 3 - 1;
                if (y < 0 || y >= s.h) continue;
                for (long i = 0; i < s.n; i++) {
                    const T *of_dz = dz + (i * s.rows + row) * s.cols * s.O, *of_x = x + i * s.image() + (y * s.w + left) * s.C;
                    for (long col = left < 0; col < s.cols && col * s.stride + left < s.w; col++)
                        lines[held++] = {of_dz + col * s.O, of_x + col * s.stride * s.C};
                }
            }
            in_groups(held, PAIRS, [&](long begin, long end) {
                outers(&lines[begin], end - begin, s.O, s.C, dweight + t * s.C, 9 * s.C);
            });
        }
}

// A square of vectors, turned: in each round every vector swaps every other block of so many lanes with its partner.
template <class T> inline void turn(V<T>* rows) {
    constexpr int L = LANES<T>;
    typedef Mask<T> Lanes;
#pragma GCC unroll 4
    for (int size = 1; size < L; size *= 2) {
        Lanes low, high;
        for (int k = 0; k < L; k++) {
            low[k] = k & size ? L + k - size : k;
            high[k] = k & size ? L + k : k + size;
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (!(i & size)) {
                const V<T> a = rows[i], b = rows[i + size];
                rows[i] = __builtin_shuffle(a, b, low), rows[i + size] = __builtin_shuffle(a, b, high);
            }
    }
}

// From [height, width] to [width, height]; one of them is a multiple of a vector, the other may end in a part of one.
template <class T> void turn(const T* from, long height, long width, T* to) {
    constexpr long L = LANES<T>;
    for (long i = 0; i < height; i += L)
        for (long j = 0; j < width; j += L) {
            if (i + L > height || j + L > width) {
                for (long k = i; k < std::min(i + L, height); k++)
                    for (long l = j; l < std::min(j + L, width); l++) to[l * height + k] = from[k * width + l];
                continue;
            }
            V<T> rows[L];
            for (long k = 0; k < L; k++) rows[k] = load(from + (i + k) * width + j);
            turn<T>(rows);
            for (long k = 0; k < L; k++) store(to + (j + k) * height + i, rows[k]);
        }
}

// The weight as `product` takes it: [3, 3, C, O], or transformed.
template <class T> const T* turned(const Shape& s, const T* weight, Memory<T>& memory) {
    const long count = s.C * s.O;
    T* to = memory.room((s.by_squares() ? 25 : 9) * count);
    turn(weight, s.O, 9 * s.C, to);
    if (!s.by_squares()) return to;
    transformed_weight<T>(count, [&](int t, long at) { return load(to + t * count + at); }, to + 9 * count);
    return to + 9 * count;
}

// One task's block: a = relu(y), pooled or not, y = gain zh + shift, zh = scale (z - mean).
template <class T> struct Task {
    const T *x, *weight, *gain, *shift;
    T *a, *z, *mean, *scale;
    V<T> zh(long at, long c) const { return (load(z + at) - load(mean + c)) * load(scale + c); }
    V<T> y(long at, long c) const { return load(gain + c) * zh(at, c) + load(shift + c); }
};

// The outputs of a band of positions, band = 0, 1, ... < bands: f(M, at, through, p, c) for each vector of an output. at[M]: where its
// positions lie in z, through[M]: whether da reaches them, p: where the output lies in a, -1 for what pooling leaves out, c: its channel.
inline long bands(const Shape& s) { return s.n * (s.pooled ? (s.rows + 1) / 2 : s.rows); }

template <class T, class Y, class F> inline void band(const Shape& s, const Y& t, long band, F f) {
    const long O = s.O;
    if (!s.pooled) {
        for (long p = band * s.cols; p < (band + 1) * s.cols; p++)
            for (long c = 0; c < O; c += LANES<T>) {
                const long at = p * O + c;
                const Mask<T> through = t.y(at, c) > 0;
                f(std::integral_constant<int, 1>(), &at, &through, at, c);
            }
        return;
    }
    const long half = (s.rows + 1) / 2, image = band / half, row = band % half, cols = s.cols / 2;
    const long start = (image * s.rows + 2 * row) * s.cols;
    const bool whole = 2 * row + 1 < s.rows;
    const Mask<T> nothing = {};
    auto left_out = [&](long position) {
        for (long c = 0; c < O; c += LANES<T>) {
            const long at = position * O + c;
            f(std::integral_constant<int, 1>(), &at, &nothing, -1, c);
        }
    };
    if (whole)
        for (long col = 0; col < cols; col++)
            for (long c = 0; c < O; c += LANES<T>) {
                const long corner = (start + 2 * col) * O + c, at[4] = {corner, corner + O, corner + s.cols * O, corner + (s.cols + 1) * O};
                V<T> values[4], best = {};
                for (int k = 0; k < 4; k++) {
                    values[k] = t.y(at[k], c);
                    best = values[k] > best ? values[k] : best;
                }
                Mask<T> left = best > 0, through[4];  // the first maximum, if it is positive
                for (int k = 0; k < 4; k++) through[k] = left & (values[k] == best), left &= ~through[k];
                f(std::integral_constant<int, 4>(), at, through, ((image * (s.rows / 2) + row) * cols + col) * O + c, c);
            }
    for (long col = whole ? 2 * cols : 0; col < s.cols; col++) {
        left_out(start + col);
        if (whole) left_out(start + s.cols + col);
    }
}

// a of a band.
template <class T, class Y> void activate(const Shape& s, const Y& y, long b, T* to) {
    band<T>(s, y, b, [&](auto M, const long* at, const Mask<T>* through, long p, long c) {
        if (p < 0) return;
        V<T> a = {};
        for (int k = 0; k < M; k++) a = through[k] ? y.y(at[k], c) : a;
        store(to + p, a);
    });
}

// The band that is whole once an image's row is, or -1.
inline long whole_band(const Shape& s, long image, long row) {
    if (!s.pooled) return image * s.rows + row;
    return row % 2 || row == s.rows - 1 ? image * ((s.rows + 1) / 2) + row / 2 : -1;
}

// sums [S, O] += those of a band's outputs, which are summed by themselves first, so that rounding does not grow with their number.
// f as above, with S sums [O] behind the others.
template <class T, int S, class F> void add_sums(const Shape& s, const Task<T>& t, long b, T* sums, T* part, F f) {
    std::fill(part, part + S * s.O, T(0));
    band<T>(s, t, b, [&](auto M, const long* at, const Mask<T>* through, long p, long c) { f(M, at, through, p, c, part + c); });
    for (long c = 0; c < S * s.O; c += LANES<T>) add(sums + c, load(part + c));
}

// Mean and squares off it of so many more positions, joined to those of `before` (Chan, Golub, LeVeque 1983).
template <class T> void add_moments(const T* z, long count, long before, long O, T* mean, T* squares) {
    const T share = T(count) / (before + count);
    for (long c = 0; c < O; c += LANES<T>) {
        V<T> sum = {}, square = {};
        for (long p = 0; p < count; p++) sum += load(z + p * O + c);
        const V<T> own = sum / T(count), off = own - load(mean + c);
        for (long p = 0; p < count; p++) square += (load(z + p * O + c) - own) * (load(z + p * O + c) - own);
        add(mean + c, off * share);
        add(squares + c, square + off * off * (before * share));
    }
}

template <class T> void forward(const Shape& s, const Task<T>& t, const T* ready, Work<T>& work) {
    const Pair<T> pair{t.x, ready ? ready : turned(s, t.weight, work.turned)};
    const long O = s.O;
    long before = 0;
    std::fill(t.mean, t.mean + O, T(0)), std::fill(t.scale, t.scale + O, T(0));
    product(s, &pair, 1, t.z, work, [&](long image, long row) {
        add_moments(t.z + (image * s.rows + row) * s.cols * O, s.cols, before, O, t.mean, t.scale);
        before += s.cols;
    });
    for (long c = 0; c < O; c++) t.scale[c] = 1 / std::sqrt(t.scale[c] / s.positions() + T(EPS));
    for (long b = 0; b < bands(s); b++) activate(s, t, b, t.a);
}

// dz = gain scale (dy - mean(dy) - zh mean(dy zh)), and what else there is of it.
template <class T>
void to_dz(const Shape& s, const Task<T>& t, const T* da, const T* dgain, const T* dshift, const T* more, T* dz) {
    const V<T> share = every(T(1) / s.positions());
    for (long b = 0; b < bands(s); b++)
        band<T>(s, t, b, [&](auto M, const long* at, const Mask<T>* through, long p, long c) {
            const V<T> zero = {}, da_p = p < 0 ? zero : load(da + p);
            for (int k = 0; k < M; k++) {
                const V<T> inner = (through[k] ? da_p : zero) - share * load(dshift + c) - t.zh(at[k], c) * (share * load(dgain + c));
                const V<T> own = load(t.gain + c) * load(t.scale + c) * inner;
                store(dz + at[k], more ? own + load(more + at[k]) : own);
            }
        });
}

template <class T>
void first(const Shape& s, const Task<T>& t, const T* da, const T* more, T* dx, T* dweight, T* dgain, T* dshift, Work<T>& work) {
    const long O = s.O;
    T *sums = work.sums.room(4 * O), *dz = work.dz.room(s.positions() * O);
    std::fill(sums, sums + 2 * O, T(0));
    for (long b = 0; b < bands(s); b++)
        add_sums<T, 2>(s, t, b, sums, sums + 2 * O, [&](auto M, const long* at, const Mask<T>* through, long p, long c, T* part) {
            if (p < 0) return;
            const V<T> zero = {}, da_p = load(da + p);
            V<T> one = {}, along = {};
            for (int k = 0; k < M; k++) {
                const V<T> dy = through[k] ? da_p : zero;
                one += dy, along += dy * t.zh(at[k], c);
            }
            add(part, one), add(part + O, along);
        });
    std::copy_n(sums, O, dshift), std::copy_n(sums + O, O, dgain);
    to_dz(s, t, da, dgain, dshift, more, dz);
    product_on_weight(s, dz, t.x, dweight, work);
    if (dx) product_on_x(s, dz, t.weight, dx, work);
}

template <class T> struct Second {  // cotangents of the first derivative, and what it gave
    const T *ddx, *ddweight, *ddgain, *ddshift, *da, *dgain, *dshift;
    T *on_da, *on_x, *on_weight, *on_z, *on_gain;
};

// norm_second of models/convolution.py, with q for ddz, between the products on both sides. z's other products, on x and on the weight,
// follow when `first` has the rest of on_z too.
template <class T> void second(const Shape& s, const Task<T>& t, const Second<T>& d, const T* ready, Work<T>& work) {
    const long count = s.positions(), O = s.O;
    T *q = d.on_z, *sums = work.sums.room(9 * O);
    Pair<T> pairs[2] = {{t.x, turned(s, d.ddweight, work.other_turned)}};
    if (d.ddx) {
        T* dz = work.dz.room(count * O);
        to_dz<T>(s, t, d.da, d.dgain, d.dshift, nullptr, dz);
        product_on_weight(s, dz, d.ddx, d.on_weight, work);
        product_on_x(s, dz, d.ddweight, d.on_x, work);
        pairs[1] = {d.ddx, ready ? ready : turned(s, t.weight, work.turned)};
    }
    std::fill(sums, sums + 3 * O, T(0));
    product(s, pairs, d.ddx ? 2 : 1, q, work, [&](long image, long row) {
        const long b = whole_band(s, image, row);
        if (b < 0) return;
        add_sums<T, 3>(s, t, b, sums, sums + 3 * O, [&](auto M, const long* at, const Mask<T>* through, long p, long c, T* part) {
            const V<T> zero = {}, da = p < 0 ? zero : load(d.da + p);
            V<T> total = {}, along = {}, inner = {};
            for (int k = 0; k < M; k++) {
                const V<T> v = load(q + at[k]);
                total += v, along += v * t.zh(at[k], c), inner += through[k] ? v * da : zero;
            }
            add(part, total), add(part + O, along), add(part + 2 * O, inner);
        });
    });
    const T *total = sums, *along = sums + O, *inner = sums + 2 * O;  // <q, 1>, <q, zh>, <q, dy>
    // on_dy = slope q + dy0 + dy1 zh and e = e0 q + e1 dy + e2 + e3 zh
    T *dy0 = sums + 3 * O, *dy1 = sums + 4 * O, *e0 = sums + 5 * O, *e1 = sums + 6 * O, *e2 = sums + 7 * O, *e3 = sums + 8 * O;
    for (long c = 0; c < O; c++) {
        const T scale = t.scale[c], slope = t.gain[c] * scale;
        const T projected = inner[c] - (total[c] * d.dshift[c] + along[c] * d.dgain[c]) / count;  // <P q, dy>
        d.on_gain[c] = scale * projected;
        dy0[c] = d.ddshift[c] - slope * total[c] / count;
        dy1[c] = d.ddgain[c] - slope * along[c] / count;
        const T u = -slope * d.dgain[c] / count, v = dy1[c];
        e0[c] = scale * u, e1[c] = scale * v;
        e2[c] = -scale * (u * total[c] + v * d.dshift[c]) / count;
        e3[c] = -scale * ((u * along[c] + v * d.dgain[c]) / count + slope * projected / count);
    }
    for (long b = 0; b < bands(s); b++)
        band<T>(s, t, b, [&](auto M, const long* at, const Mask<T>* through, long p, long c) {
            const V<T> zero = {}, da = p < 0 ? zero : load(d.da + p);
            V<T> on_da = {};
            for (int k = 0; k < M; k++) {
                const V<T> v = load(q + at[k]), zh = t.zh(at[k], c);
                const V<T> on_dy = load(t.gain + c) * load(t.scale + c) * v + load(dy0 + c) + load(dy1 + c) * zh;
                on_da = through[k] ? on_dy : on_da;
                store(q + at[k], load(e0 + c) * v + load(e1 + c) * (through[k] ? da : zero) + load(e2 + c) + load(e3 + c) * zh);
            }
            if (p >= 0) store(d.on_da + p, on_da);
        });
}

// The block that takes data. Its z = w . X, of a patch X of 9 C numbers: X's mean and covariance make z's moments, and all sums over
// positions that the second derivative needs, products of small matrices. So z is kept nowhere: each pass computes y anew, one product of
// the patches with a weight that has the normalisation in it.

template <class T> struct Patches {
    const Shape& s;
    const long size, part, width, apart;  // of a patch; of a row of its window, in whole vectors; of a patch and more; from one to the next
    explicit Patches(const Shape& s)
        : s(s), size(9 * s.C), part(whole(3 * s.C)), width((size / (2 * LANES<T>) + 1) * 2 * LANES<T>),  // an even number of vectors
          apart(std::max(6 * s.C + part, width)) {}
    static long whole(long numbers) { return (numbers + LANES<T> - 1) / LANES<T> * LANES<T>; }

    template <class From> const T* bordered(const From* x, Memory<T>& memory) const {
        const long line = (s.w + 2) * s.C, all = s.n * (s.h + 2) * line + LANES<T>;  // the last patch is read beyond its end
        T* to = memory.room(all);
        std::fill(to, to + all, T(0));
        for (long i = 0; i < s.n; i++)
            for (long y = 0; y < s.h; y++)
                std::copy_n(x + (i * s.h + y) * s.w * s.C, s.w * s.C, to + (i * (s.h + 2) + y + 1) * line + s.C);
        return to;
    }

    // Those of a row of outputs, each with a one behind it.
    void fill(const T* bordered, long image, long row, T* to) const {
        for (long col = 0; col < s.cols; col++, to += apart) {
            const T* from = bordered + ((image * (s.h + 2) + row * s.stride) * (s.w + 2) + col * s.stride) * s.C;
            for (T* line = to; line < to + size; line += 3 * s.C, from += (s.w + 2) * s.C)
                for (long k = 0; k < part; k += LANES<T>) store(line + k, load(from + k));  // the next line ends this one
            to[size] = 1;
        }
    }

    // to [count, O]: with a weight [size + 1, O].
    void product(const T* patches, long count, const T* weight, T* to) const {
        const Pair<T> pair{patches, weight};
        matrix_product(&pair, 1, count, apart, size + 1, s.O, to);
    }

    // sums [size + 1, width] += products of patches with `others`, which lie their_apart.
    void add_products(const T* patches, long count, const T* others, long their_apart, long width, T* sums,
                      std::vector<Pair<T>>& lines) const {
        lines.resize(count);
        for (long p = 0; p < count; p++) lines[p] = {patches + p * apart, others + p * their_apart};
        outers(lines.data(), count, size + 1, width, sums, width);
    }
};

// The patches' covariance [size, size] and mean [size], in double: the mean may be large beside the rest.
template <class T> void take_moments(const Shape& s, const T* x, double* moments, Work<double>& work) {
    const Patches<double> patches(s);
    const long size = patches.size, width = patches.width, count = s.positions();
    const double* bordered = patches.bordered(x, work.bordered);
    double *row = work.patches.room(s.cols * patches.apart), *sums = work.sums.room((size + 1) * width);
    std::fill(sums, sums + (size + 1) * width, 0.0);
    for (long i = 0; i < s.n; i++)
        for (long y = 0; y < s.rows; y++) {
            patches.fill(bordered, i, y, row);
            patches.add_products(row, s.cols, row, patches.apart, width, sums, work.lines);
        }
    double* mean = moments + size * size;
    for (long k = 0; k < size; k++) mean[k] = sums[size * width + k] / count;
    for (long i = 0; i < size; i++)
        for (long k = 0; k < size; k++) moments[i * size + k] = sums[i * width + k] / count - mean[i] * mean[k];
}

template <class T> struct BandY {  // y of a band that begins at `start`
    const T* rows;
    long start;
    V<T> y(long at, long) const { return load(rows + at - start); }
};

using Numbers = std::vector<double>;

// One task's, ready for a pass: matrices [size, O], for each output a column.
template <class T> struct Data {
    const Shape& s;
    const Task<T>& t;
    Work<T>& work;
    const Patches<T> patches{s};
    const long size = patches.size, O = s.O;
    const double *covariance, *mean;
    const T *x = patches.bordered(t.x, work.bordered), *y_weight;
    Numbers weight, weighted, scale;  // `weighted`: times the covariance

    Data(const Shape& s, const Task<T>& t, const double* moments, Work<T>& work)
        : s(s), t(t), work(work), covariance(moments), mean(moments + size * size), weight(turned(t.weight)),
          weighted(times_covariance(weight)), scale(dot(weight, weighted.data())) {
        for (double& v : scale) v = 1 / std::sqrt(v + EPS);
        Numbers matrix(weight);
        for (long i = 0; i < size * O; i++) matrix[i] *= t.gain[i % O] * scale[i % O];
        y_weight = affine(matrix, t.shift, work.turned);
    }
    Numbers turned(const T* from) const {
        Numbers to(size * O);
        for (long i = 0; i < size; i++)
            for (long c = 0; c < O; c++) to[i * O + c] = from[c * size + i];
        return to;
    }
    Numbers times_covariance(const Numbers& a) const {
        Numbers to(size * O);
        for (long i = 0; i < size; i++)
            for (long k = 0; k < size; k++)
                for (long c = 0; c < O; c++) to[i * O + c] += covariance[i * size + k] * a[k * O + c];
        return to;
    }
    Numbers dot(const Numbers& a, const double* b) const {
        Numbers to(O);
        for (long i = 0; i < size; i++)
            for (long c = 0; c < O; c++) to[c] += a[i * O + c] * b[i * O + c];
        return to;
    }
    // [size + 1, O], for `product`: X - mean with a matrix, and a row beside it.
    const T* affine(const Numbers& matrix, const T* row, Memory<T>& memory) const {
        T* to = memory.room((size + 1) * O);
        Numbers bias(row, row + O);
        for (long i = 0; i < size; i++)
            for (long c = 0; c < O; c++) to[i * O + c] = matrix[i * O + c], bias[c] -= matrix[i * O + c] * mean[i];
        std::copy_n(bias.data(), O, to + size * O);
        return to;
    }

    // For each of an image's bands f(band, y, its patches, how many).
    template <class F> void bands_of(long image, F f) const {
        const long height = s.pooled ? 2 : 1, each = bands(s) / s.n;
        T *patch = work.patches.room(height * s.cols * patches.apart), *y = work.y.room(height * s.cols * O);
        for (long b = 0; b < each; b++) {
            const long row = b * height, rows = std::min(height, s.rows - row);
            for (long r = 0; r < rows; r++) patches.fill(x, image, row + r, patch + r * s.cols * patches.apart);
            patches.product(patch, rows * s.cols, y_weight, y);
            f(image * each + b, BandY<T>{y, (image * s.rows + row) * s.cols * O}, patch, rows * s.cols);
        }
    }
};

template <class T> void forward_of_data(const Shape& s, const Task<T>& t, double* moments, Work<T>& work, Work<double>& other) {
    take_moments(s, t.x, moments, other);
    const Data<T> data(s, t, moments, work);
    for (long i = 0; i < s.n; i++)
        data.bands_of(i, [&](long b, const BandY<T>& y, const T*, long) { activate(s, y, b, t.a); });
}

// sums [size + 1, O]: <dy, X - mean> and <dy, 1>.
template <class T>
void first_of_data(const Shape& s, const Task<T>& t, const double* moments, const T* da, T* dweight, T* dgain, T* dshift, double* sums,
                   Work<T>& work) {
    const Data<T> data(s, t, moments, work);
    const long size = data.size, O = s.O, all = (size + 1) * O;
    T *dy = work.dz.room(2 * s.cols * O), *part = work.sums.room(all);
    std::fill(sums, sums + all, 0.0);
    for (long i = 0; i < s.n; i++) {
        std::fill(part, part + all, T(0));
        data.bands_of(i, [&](long b, const BandY<T>& y, const T* patches, long count) {
            for (long k = 0, next = (s.pooled ? s.cols / 2 : s.cols) * O; k < next; k += 64 / sizeof(T))
                __builtin_prefetch(da + (b + 1) * next + k);
            band<T>(s, y, b, [&](auto M, const long* at, const Mask<T>* through, long p, long) {
                const V<T> zero = {}, da_p = p < 0 ? zero : load(da + p);
                for (int k = 0; k < M; k++) store(dy + at[k] - y.start, through[k] ? da_p : zero);
            });
            data.patches.add_products(patches, count, dy, O, O, part, work.lines);
        });
        for (long k = 0; k < all; k++) sums[k] += part[k];
    }
    for (long k = 0; k < size; k++)
        for (long c = 0; c < O; c++) sums[k * O + c] -= data.mean[k] * sums[size * O + c];
    const Numbers along = data.dot(data.weight, sums);
    for (long c = 0; c < O; c++) {
        const double scale = data.scale[c], slope = t.gain[c] * scale;
        dshift[c] = sums[size * O + c], dgain[c] = scale * along[c];
        for (long k = 0; k < size; k++)
            dweight[c * size + k] = slope * (sums[k * O + c] - scale * scale * along[c] * data.weighted[k * O + c]);
    }
}

// `second` with its sums as such products, v for ddweight; on_z's product with x is in on_weight.
template <class T>
void second_of_data(const Shape& s, const Task<T>& t, const double* moments, const Second<T>& d, const double* sums, Work<T>& work) {
    const Data<T> data(s, t, moments, work);
    const long size = data.size, O = s.O;
    const Numbers v = data.turned(d.ddweight), v_weighted = data.times_covariance(v), v_z = data.dot(v, data.weighted.data()),
                  v_dy = data.dot(v, sums), z_dy = data.dot(data.weight, sums);
    Numbers matrix(v);
    for (long c = 0; c < O; c++) {
        const double scale = data.scale[c], slope = t.gain[c] * scale, along = scale * v_z[c], dgain = scale * z_dy[c];
        const double projected = v_dy[c] - along * dgain, u = -slope * dgain, dy1 = d.ddgain[c] - slope * along;
        const double e3 = -scale * (u * along + dy1 * dgain + slope * projected);
        d.on_gain[c] = scale * projected;
        for (long k = 0, at = c; k < size; k++, at += O) {
            matrix[at] = slope * v[at] + dy1 * scale * data.weight[at];
            d.on_weight[c * size + k] = scale * (u * v_weighted[at] + dy1 * sums[at] + e3 * data.weighted[at]);
        }
    }
    const T* on_dy_weight = data.affine(matrix, d.ddshift, work.other_turned);
    T* on_dy = work.dz.room(2 * s.cols * O);
    for (long i = 0; i < s.n; i++)
        data.bands_of(i, [&](long b, const BandY<T>& y, const T* patches, long count) {
            data.patches.product(patches, count, on_dy_weight, on_dy);
            band<T>(s, y, b, [&](auto M, const long* at, const Mask<T>* through, long p, long) {
                if (p < 0) return;
                V<T> on_da = {};
                for (int k = 0; k < M; k++) on_da = through[k] ? load(on_dy + at[k] - y.start) : on_da;
                store(d.on_da + p, on_da);
            });
        });
}

// What models/native.py passes: sizes and, for each tensor, where it is and how far tasks lie apart in it (0: they share it).
struct Call {
    int64_t tasks, threads, pooled, data, n, h, w, C, O, stride;
};
template <class T> struct Of {
    T* at;
    int64_t apart;
    T* of(int64_t task) const { return at ? at + task * apart : nullptr; }
};
template <class T> struct Tensors {
    Of<T> x, weight, gain, shift, a, z, mean, scale, da, dx, dweight, dgain, dshift, ddx, ddweight, ddgain, ddshift, on_da, on_x, on_weight,
        on_z, on_gain, more;
    Of<double> moments, sums;
};

template <class T> void run(const Call& call, const Tensors<T>& m, int order) {
    const Shape s{call.n, call.h, call.w, call.C, (call.h - 1) / call.stride + 1, (call.w - 1) / call.stride + 1, call.O, int(call.stride),
                  call.pooled != 0};
    Memory<T> memory;
    const T* ready = order != 1 && m.weight.apart == 0 && !call.data ? turned(s, m.weight.at, memory) : nullptr;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads) if (call.threads > 1 && call.tasks > 1)
    for (int64_t i = 0; i < call.tasks; i++) {
        static thread_local Work<T> work;
        const Task<T> t{m.x.of(i), m.weight.of(i), m.gain.of(i), m.shift.of(i), m.a.of(i), m.z.of(i), m.mean.of(i), m.scale.of(i)};
        const Second<T> d{m.ddx.of(i), m.ddweight.of(i), m.ddgain.of(i), m.ddshift.of(i), m.da.of(i), m.dgain.of(i), m.dshift.of(i),
                          m.on_da.of(i), m.on_x.of(i), m.on_weight.of(i), m.on_z.of(i), m.on_gain.of(i)};
        if (call.data) {
            static thread_local Work<double> other;
            if (order == 0)
                forward_of_data(s, t, m.moments.of(i), work, other);
            else if (order == 1)
                first_of_data(s, t, m.moments.of(i), m.da.of(i), m.dweight.of(i), m.dgain.of(i), m.dshift.of(i), m.sums.of(i), work);
            else
                second_of_data(s, t, m.moments.of(i), d, m.sums.of(i), work);
        } else if (order == 0)
            forward(s, t, ready, work);
        else if (order == 1)
            first(s, t, m.da.of(i), m.more.of(i), m.dx.of(i), m.dweight.of(i), m.dgain.of(i), m.dshift.of(i), work);
        else
            second(s, t, d, ready, work);
    }
}

// to [tasks, parts]: the sums of a b over each of a task's parts, of so many `sizes`; products in T, sums in double.
template <class T>
void products(int64_t tasks, int64_t threads, int64_t parts, const int64_t* sizes, const Of<const T>* a, const Of<const T>* b, double* to) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tasks > 1)
    for (int64_t i = 0; i < tasks; i++)
        for (int64_t k = 0; k < parts; k++) {
            const T *left = a[k].of(i), *right = b[k].of(i);
            constexpr int L = 2 * LANES<double>;
            double sums[L] = {};
            long at = 0;
            for (; at + L <= sizes[k]; at += L)
                for (int l = 0; l < L; l++) sums[l] += left[at + l] * right[at + l];
            for (; at < sizes[k]; at++) sums[0] += left[at] * right[at];
            double sum = 0;
            for (double part : sums) sum += part;
            to[i * parts + k] = sum;
        }
}

}  // namespace

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern "C" {
const char* version() { return TEXT(VERSION); }  // the handshake of native.py
void run_float(const Call* call, const Tensors<float>* tensors, int order) { run(*call, *tensors, order); }
void run_double(const Call* call, const Tensors<double>* tensors, int order) { run(*call, *tensors, order); }
void products_float(int64_t tasks, int64_t threads, int64_t parts, const int64_t* sizes, const Of<const float>* a,
                    const Of<const float>* b, double* to) {
    products(tasks, threads, parts, sizes, a, b, to);
}
void products_double(int64_t tasks, int64_t threads, int64_t parts, const int64_t* sizes, const Of<const double>* a,
                     const Of<const double>* b, double* to) {
    products(tasks, threads, parts, sizes, a, b, to);
}
}
