// The attention's energies, w · f(W_a a_i + q), and their gradients in one pass over the hidden
// layer, whose values stand in registers alone: what `kernels.plain_energies` is the formula of.
// `fused.py` builds and calls it. It knows nothing of PyTorch, so that it compiles in a second.
//
// There are I images of L places with A hidden values, and n rows; images (n) has each row's image.
// projected (I, L, A) is float32 or bfloat16, all else float32; everything is contiguous.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16;
#else
constexpr int64_t WIDTH = 8;
#endif
using Vector = float __attribute__((vector_size(4 * WIDTH)));
using Bits = uint32_t __attribute__((vector_size(4 * WIDTH)));
using Half = uint16_t __attribute__((vector_size(2 * WIDTH)));

constexpr int64_t PLACES = 16, HIDDEN = 128;  // of a task, of which threads take one after another
constexpr int64_t SMALL = 1 << 15;            // so few hidden values one thread makes sooner

template <class V, class T>
V read(const T* from, int64_t n) {  // zeros after n values
    V values = {};
    if (n >= WIDTH)
        std::memcpy(&values, from, sizeof values);
    else
        for (int64_t i = 0; i < n; i++) values[i] = from[i];
    return values;
}

Vector load(const float* from, int64_t n) { return read<Vector>(from, n); }

Vector load(const uint16_t* from, int64_t n) {  // bfloat16 is the upper half of a float32
    return (Vector)(__builtin_convertvector(read<Half>(from, n), Bits) << 16);
}

void store(float* to, Vector values, int64_t n) {
    if (n >= WIDTH)
        std::memcpy(to, &values, sizeof values);
    else
        for (int64_t i = 0; i < n; i++) to[i] = values[i];
}

float sum(Vector values) {
    float total = 0;
    for (int64_t i = 0; i < WIDTH; i++) total += values[i];
    return total;
}

// f, and g · f' where f has the value y. Comparisons are such that nan stays nan.

struct Relu {
    static constexpr bool homogeneous = true;  // f(x) = x f'(x), which `kernels` makes use of
    static Vector of(Vector x) { return 0 > x ? Vector{} : x; }
    static Vector slope(Vector y, float g) { return y > 0 ? Vector{} + g : Vector{}; }
};

struct Tanh {
    static constexpr bool homogeneous = false;
    static Vector slope(Vector y, float g) { return g * (1 - y * y); }
    static Vector of(Vector x) {  // Eigen's quotient of polynomials; 1 in float32 from 7.9 on
        const Vector end = Vector{} + 7.90531110763549805f;
        x = x > end ? end : x;
        x = x < -end ? -end : x;
        Vector s = x * x;
        Vector over = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
        for (float c : {-8.60467152213735e-11f, 5.12229709037114e-08f, 1.48572235717979e-05f,
                        6.37261928875436e-04f, 4.89352455891786e-03f})
            over = over * s + c;
        Vector under = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
        for (float c : {2.26843463243900e-03f, 4.89352518554385e-03f}) under = under * s + c;
        return x * over / under;
    }
};

struct Rows {  // which rows each image has
    std::vector<int64_t> order, start;

    Rows(const int64_t* images, int64_t I, int64_t n) : order(n), start(I + 2) {
        for (int64_t r = 0; r < n; r++) start[images[r] + 2]++;
        for (int64_t i = 1; i <= I; i++) start[i + 1] += start[i];
        for (int64_t r = 0; r < n; r++) order[start[images[r] + 1]++] = r;
    }
    const int64_t* begin(int64_t image) const { return order.data() + start[image]; }
    const int64_t* end(int64_t image) const { return begin(image + 1); }
};

template <class Keys>  // a pointer to float32 or bfloat16
struct Problem {
    Keys projected;
    const float* query;
    Rows rows;
    int64_t I, L, A;
    int threads;
};

// The energies of R rows at one place, whose keys are read once.
template <class F, int R, class Keys>
void energies_of(const Problem<Keys>& of, const float* w, Keys key, const int64_t* rows,
                 float* energies) {
    const float* query[R];
    Vector sums[R] = {};
    for (int r = 0; r < R; r++) query[r] = of.query + rows[r] * of.A;
    for (int64_t a = 0; a < of.A; a += WIDTH) {
        Vector k = load(key + a, of.A - a), weight = load(w + a, of.A - a);
        for (int r = 0; r < R; r++) sums[r] += weight * F::of(k + load(query[r] + a, of.A - a));
    }
    for (int r = 0; r < R; r++) energies[rows[r] * of.L] = sum(sums[r]);
}

template <class F, class Keys>
void energies_of_all(const Problem<Keys>& of, const float* w, float* energies) {
    const int64_t blocks = (of.L + PLACES - 1) / PLACES;
#pragma omp parallel for num_threads(of.threads)
    for (int64_t task = 0; task < of.I * blocks; task++) {
        const int64_t image = task / blocks, first = task % blocks * PLACES;
        const int64_t* end = of.rows.end(image);
        for (const int64_t* row = of.rows.begin(image); row < end; row += 4)
            for (int64_t i = first; i < std::min(of.L, first + PLACES); i++) {
                const Keys key = of.projected + (image * of.L + i) * of.A;
                switch (end - row) {
                    case 1: energies_of<F, 1>(of, w, key, row, energies + i); break;
                    case 2: energies_of<F, 2>(of, w, key, row, energies + i); break;
                    case 3: energies_of<F, 3>(of, w, key, row, energies + i); break;
                    default: energies_of<F, 4>(of, w, key, row, energies + i);
                }
            }
    }
}

struct Sums {  // what the gradients are made of; each is added to
    float *keys, *query, *hidden;
};

// Σ grad · f' at P places of an image, by place and by row, at the hidden values from a on; and by
// row Σ grad · f, where that does not follow from the others.
template <class F, int P, class Keys>
void slopes_of(const Problem<Keys>& of, const float* grad, int64_t image, int64_t i, int64_t a,
               const Sums& to) {
    const int64_t first = (image * of.L + i) * of.A + a, left = of.A - a;
    Vector key[P], place[P];
    for (int p = 0; p < P; p++) {
        key[p] = load(of.projected + first + p * of.A, left);
        place[p] = load(to.keys + first + p * of.A, left);
    }
    for (const int64_t* row = of.rows.begin(image); row < of.rows.end(image); row++) {
        const int64_t own = *row * of.A + a;
        Vector q = load(of.query + own, left), slopes = load(to.query + own, left), values = {};
        for (int p = 0; p < P; p++) {
            const float g = grad[*row * of.L + i + p];
            const Vector y = F::of(key[p] + q), slope = F::slope(y, g);
            slopes += slope;
            place[p] += slope;
            if (!F::homogeneous) values += g * y;
        }
        store(to.query + own, slopes, left);
        if (!F::homogeneous) store(to.hidden + own, load(to.hidden + own, left) + values, left);
    }
    for (int p = 0; p < P; p++) store(to.keys + first + p * of.A, place[p], left);
}

template <class F, class Keys>
void slopes_of_all(const Problem<Keys>& of, const float* grad, const Sums& to) {
    const int64_t blocks = (of.A + HIDDEN - 1) / HIDDEN;
#pragma omp parallel for num_threads(of.threads)
    for (int64_t task = 0; task < of.I * blocks; task++) {
        const int64_t image = task / blocks, first = task % blocks * HIDDEN;
        const int64_t end = std::min(of.A, first + HIDDEN);
        int64_t i = 0;
        for (; i + 4 <= of.L; i += 4)
            for (int64_t a = first; a < end; a += WIDTH)
                slopes_of<F, 4>(of, grad, image, i, a, to);
        for (; i < of.L; i++)
            for (int64_t a = first; a < end; a += WIDTH)
                slopes_of<F, 1>(of, grad, image, i, a, to);
    }
}

// run(f, projected) of the kinds that there are.
template <class Run>
void by_kind(int bfloat16, int tanh, const void* projected, Run run) {
    const auto of = [&](auto f) {
        bfloat16 ? run(f, (const uint16_t*)projected) : run(f, (const float*)projected);
    };
    tanh ? of(Tanh{}) : of(Relu{});
}

}  // namespace

extern "C" void forward(int bfloat16, int tanh, const void* projected, const float* query,
                        const int64_t* images, int64_t I, int64_t L, int64_t A, int64_t n,
                        int threads, const float* w, float* energies) {
    by_kind(bfloat16, tanh, projected, [&](auto f, auto* keys) {
        const Problem<decltype(keys)> of{keys, query, Rows(images, I, n), I, L, A,
                                         n * L * A < SMALL ? 1 : threads};
        energies_of_all<decltype(f)>(of, w, energies);
    });
}

extern "C" void backward(int bfloat16, int tanh, const void* projected, const float* query,
                         const int64_t* images, int64_t I, int64_t L, int64_t A, int64_t n,
                         int threads, const float* grad, float* of_keys, float* of_query,
                         float* of_hidden) {
    by_kind(bfloat16, tanh, projected, [&](auto f, auto* keys) {
        const Problem<decltype(keys)> of{keys, query, Rows(images, I, n), I, L, A,
                                         n * L * A < SMALL ? 1 : threads};
        slopes_of_all<decltype(f)>(of, grad, {of_keys, of_query, of_hidden});
    });
}
