// Winograd's F(2x2, 3x3): a tile of 2x2 results takes 16 products an input channel where plain sums take 36. With
//
//   Y = Aᵀ [Σ_in (G g Gᵀ) ∘ (Bᵀ d B)] A,
//   Bᵀ = (1 0 −1 0 | 0 1 1 0 | 0 −1 1 0 | 0 1 0 −1),  G = (1 0 0 | ½ ½ ½ | ½ −½ ½ | 0 0 1),  Aᵀ = (1 1 1 0 | 0 1 −1 −1)
//
// for a kernel g and the 4x4 pixels d around a tile, the sum over input channels is a matrix product, tiles x in times
// in x out, for each of the 16 places. The kernels come transformed. A task is some tiles and some output channels: their
// pixels are transformed, then multiplied place by place, since one place's pixels stay in the second cache while its
// kernels come from memory, once; last the products are summed up to pixels. Each number is made in one order, whatever
// the tasks and the threads.
//
// Source: Lavin & Gray 2016, Fast Algorithms for Convolutional Neural Networks.

#include "perceptual_maps.inl"

constexpr int LANES = Lanes<float>::count;
constexpr int64_t PANEL = 16;  // output channels that lie together in `kernel`
constexpr int PANELS = LANES == 16 ? 2 : 1;  // that are made at once, for
constexpr int ROWS = LANES == 16 ? 14 : LANES == 8 ? 6 : 3;  // so many tiles: what the registers hold
constexpr int PLACES = 16;
constexpr int64_t SUM = 128;  // products summed up at a time: of more the rounding would grow
constexpr int64_t AHEAD = 64;  // rows of a panel that are fetched ahead, the first time it is read
constexpr int64_t TILES = 128;  // of a task at most

// [rows, in] times the panels' [in, 16] each, which `first` come from memory.
template <int rows, int panels, bool first>
static void product(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t in, float* c, int64_t c_pitch) {
    constexpr int vectors = int(PANEL) / LANES, width = panels * vectors;
    for (int64_t begin = 0; begin < in; begin += SUM) {
        const int64_t end = std::min(begin + SUM, in);
        Floats sum[rows][width] = {};
        for (int64_t k = begin; k < end; ++k) {
            if (first)
                for (int j = 0; j < panels; ++j) __builtin_prefetch(b + j * b_pitch + (k + AHEAD) * PANEL);
            Floats v[width];
            for (int j = 0; j < width; ++j) v[j] = load(b + j / vectors * b_pitch + k * PANEL + j % vectors * LANES);
            for (int r = 0; r < rows; ++r) {
                const Floats x = a[r * a_pitch + k] - Floats{};  // minus, so that nothing is computed
                for (int j = 0; j < width; ++j) sum[r][j] += x * v[j];
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int j = 0; j < width; ++j) {
                float* const to = c + r * c_pitch + j * LANES;
                store(to, begin == 0 ? sum[r][j] : load(to) + sum[r][j]);
            }
    }
}

template <int most, int panels, class... Given>
static void product_of(int64_t rows, bool first, Given... given) {
    if constexpr (most > 1) {
        if (rows < most) return product_of<most - 1, panels>(rows, first, given...);
    }
    first ? product<most, panels, true>(given...) : product<most, panels, false>(given...);
}

// Bᵀ of four numbers that lie `step` apart.
static inline void spread(Floats* d, int step) {
    const Floats d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
    d[0] = d0 - d2, d[step] = d1 + d2, d[2 * step] = d2 - d1, d[3 * step] = d1 - d3;
}

struct Tiles {
    const Conv3x3& k;
    const int64_t down, across, all;  // tiles of a column, of a row, in all

    explicit Tiles(const Conv3x3& k_) : k(k_), down((k.h + 1) / 2), across((k.w + 1) / 2), all(k.n * down * across) {}

    // Where the pixels of tile t and of the frame around it are among all pixels, −1 outside of the image.
    void pixels(int64_t t, int64_t (&at)[PLACES]) const {
        const int64_t image = t / (across * down), row = t / across % down * 2 - 1, column = t % across * 2 - 1;
        for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < 4; ++j) {
                const bool inside = row + i >= 0 && row + i < k.h && column + j >= 0 && column + j < k.w;
                at[4 * i + j] = inside ? (image * k.h + row + i) * k.w + column + j : -1;
            }
    }
};

// Of `count` tiles from the `first` on, to [place][tile][pitch].
template <bool masked>
static void transform(const Tiles& tiles, int64_t first, int64_t count, const float* zeros, float* to, int64_t pitch) {
    const Conv3x3& k = tiles.k;
    for (int64_t t = 0; t < count; ++t) {
        int64_t at[PLACES];
        tiles.pixels(first + t, at);
        const float *x[PLACES], *mask[PLACES];
        for (int p = 0; p < PLACES; ++p) {
            x[p] = at[p] < 0 ? zeros : k.x + at[p] * k.in;
            mask[p] = !masked || at[p] < 0 ? zeros : k.mask + at[p] * k.in;
        }
        for (int64_t c = 0; c < k.in; c += LANES) {
            Floats d[PLACES];
            for (int p = 0; p < PLACES; ++p) {
                d[p] = load(x[p] + c);
                if (masked) d[p] = load(mask[p] + c) <= 0.0f ? Floats{} : d[p];  // NaN passes, as torch's does
            }
            for (int i = 0; i < 4; ++i) spread(d + i, 4);
            for (int i = 0; i < 4; ++i) spread(d + 4 * i, 1);
            for (int p = 0; p < PLACES; ++p) store(to + (p * count + t) * pitch + c, d[p]);
        }
    }
}

// From [place][tile][width], the channels from the `channel`-th on.
static void gather(const Tiles& tiles, int64_t first, int64_t count, const float* from, int64_t width, int64_t channel) {
    const Conv3x3& k = tiles.k;
    for (int64_t t = 0; t < count; ++t) {
        int64_t at[PLACES];
        tiles.pixels(first + t, at);
        for (int64_t c = 0; c < width; c += LANES) {
            Floats half[2][4];
            for (int j = 0; j < 4; ++j) {
                Floats m[4];
                for (int i = 0; i < 4; ++i) m[i] = load(from + ((4 * i + j) * count + t) * width + c);
                half[0][j] = m[0] + m[1] + m[2], half[1][j] = m[1] - m[2] - m[3];
            }
            const Floats bias = k.bias == nullptr ? Floats{} : load(k.bias + channel + c);
            for (int p = 0; p < 4; ++p) {
                const int64_t pixel = at[4 * (p / 2 + 1) + p % 2 + 1];
                if (pixel < 0) continue;
                const Floats* h = half[p / 2];
                Floats v = (p % 2 == 0 ? h[0] + h[1] + h[2] : h[1] - h[2] - h[3]) + bias;
                if (k.relu) v = v < 0.0f ? Floats{} : v;  // NaN stays
                store(k.y + pixel * k.out + channel + c, v);
            }
        }
    }
}

// Of `width` output channels from the panel on, for one place.
template <int panels>
static void panels_of(const Conv3x3& k, int64_t count, const float* spread, int64_t pitch, const float* kernel,
                      float* products, int64_t width) {
    const int64_t blocks = (count + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t start = count * b / blocks, rows = count * (b + 1) / blocks - start;
        product_of<ROWS, panels>(rows, b == 0, spread + start * pitch, pitch, kernel, k.in * PANEL, k.in,
                                 products + start * width, width);
    }
}

// A task, the panels from `begin` to `end` of some tiles, with memory for [place][tile][pitch] and [place][tile][channel].
static void task_of(const Tiles& tiles, int64_t first, int64_t count, int64_t begin, int64_t end, float* spread,
                    int64_t pitch, float* products, const float* zeros) {
    const Conv3x3& k = tiles.k;
    const int64_t width = (end - begin) * PANEL;
    if (k.mask == nullptr)
        transform<false>(tiles, first, count, zeros, spread, pitch);
    else
        transform<true>(tiles, first, count, zeros, spread, pitch);
    for (int64_t place = 0; place < PLACES; ++place)
        for (int64_t panel = begin; panel < end; panel += PANELS) {
            const float* from = spread + place * count * pitch;
            const float* kernel = k.kernel + (place * (k.out / PANEL) + panel) * k.in * PANEL;
            float* to = products + place * count * width + (panel - begin) * PANEL;
            if (panel + PANELS <= end)
                panels_of<PANELS>(k, count, from, pitch, kernel, to, width);
            else
                panels_of<1>(k, count, from, pitch, kernel, to, width);
        }
    gather(tiles, first, count, products, width, begin * PANEL);
}

static void conv3x3(const Conv3x3& k) {
    const Tiles tiles(k);
    if (tiles.all == 0) return;
    const int64_t panels = k.out / PANEL;
    const int64_t chunks = (tiles.all + TILES - 1) / TILES, largest = (tiles.all + chunks - 1) / chunks;
    // Of few chunks a thread takes some output channels, at the price of transforming the pixels again.
    const bool few = chunks % k.threads != 0 && chunks < 4 * k.threads;
    const int64_t groups = few ? std::min<int64_t>(k.threads, (panels + PANELS - 1) / PANELS) : 1, tasks = chunks * groups;
    const int64_t pitch = k.in + PANEL;  // rows a power of two apart would share the first cache's few places
    const int64_t widest = (panels + groups - 1) / groups * PANEL, line = 64 / sizeof(float);
    const int64_t threads = std::min<int64_t>(k.threads, tasks);
    std::vector<std::unique_ptr<float[]>> memory;  // made here: an exception must not leave a parallel region
    for (int64_t t = 0; t < threads; ++t)
        memory.emplace_back(new float[size_t(PLACES * largest * (pitch + widest) + k.in + line)]);
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1) if (threads > 1)
    for (int64_t t = 0; t < threads; ++t) {
        float* const start = memory[size_t(t)].get();
        float* const spread = start + (line - int64_t(reinterpret_cast<uintptr_t>(start) % 64 / sizeof(float))) % line;
        float* const products = spread + PLACES * largest * pitch;
        float* const zeros = products + PLACES * largest * widest;
        std::fill(zeros, zeros + k.in, 0.0f);
        for (int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; ++task) {
            const int64_t chunk = task / groups, group = task % groups;
            const int64_t first = tiles.all * chunk / chunks, count = tiles.all * (chunk + 1) / chunks - first;
            const int64_t begin = panels * group / groups, end = panels * (group + 1) / groups;
            task_of(tiles, first, count, begin, end, spread, pitch, products, zeros);
        }
    }
}
