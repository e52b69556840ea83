// Float32 kernels for CPUs, on tensors in channels-last order: planes (n * z), y, x, channels.
//
// Convolutions with 3 x 3 kernels in plane use Winograd's minimal filtering F(4x4, 3x3): a quarter of the
// multiplications. Source: Lavin and Gray 2016, arXiv:1509.09308. Tiles are transformed, multiplied and
// transformed back in blocks that stay in the cache; borders are read by clamping, so nothing is padded.
// Work is shared statically and sums are joined in a fixed order, so results do not vary between runs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Int = std::int64_t;

constexpr int kLane = 8;  // channels that a transform takes at a time; channel counts are multiples of it
typedef float Lane __attribute__((vector_size(kLane * sizeof(float)), aligned(4), may_alias));
typedef std::int32_t LaneInt __attribute__((vector_size(kLane * sizeof(float)), aligned(4), may_alias));
#ifdef __AVX512F__
constexpr int kWide = 16;
#else
constexpr int kWide = 8;
#endif
typedef float Wide __attribute__((vector_size(kWide * sizeof(float)), aligned(4), may_alias));
constexpr int kPanel = 2 * kWide;  // columns of a register block
constexpr int kRows = 6;           // rows of a register block
constexpr int kTile = 4, kWindow = 6, kFreq = kWindow * kWindow;
constexpr int kBlock = 24;  // tiles in a block: its transforms fit the second-level cache
constexpr int kApart = 16;  // floats between the matrices of a block, lest they fall into the same cache sets

inline Lane load(const float* p) { return *reinterpret_cast<const Lane*>(p); }
inline void store(float* p, Lane v) { *reinterpret_cast<Lane*>(p) = v; }
inline Int padded(Int channels) { return (channels + kPanel - 1) / kPanel * kPanel; }

struct Buffer {  // aligned to cache lines and zeroed
  explicit Buffer(Int size) : store_(size + 16, 0.0f) {
    auto address = reinterpret_cast<std::uintptr_t>(store_.data());
    data = store_.data() + ((64 - address % 64) % 64) / sizeof(float);
  }
  float* data;

 private:
  std::vector<float> store_;
};

// c (rows x panel, row stride ldc) += a (element (i, k) at i * row + k * col) times b (k x panel, packed)
template <int Rows>
inline void multiply(const float* a, Int row, Int col, const float* b, Int depth, Wide (&acc)[kRows][2]) {
  for (Int k = 0; k < depth; ++k, a += col, b += kPanel) {
    const Wide b0 = *reinterpret_cast<const Wide*>(b), b1 = *reinterpret_cast<const Wide*>(b + kWide);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const float value = a[i * row];
      acc[i][0] += value * b0;
      acc[i][1] += value * b1;
    }
  }
}

struct Pairs {  // for each plane of the output, the planes and weights (taps along z) it is a sum of
  const Int *first, *source, *tap;
};

struct Grid {  // the tiles of a plane
  Int height, width, origin, rows, columns;
  Grid(Int h, Int w, bool fold)
      : height(h), width(w), origin(fold ? -1 : 0),
        rows((h + (fold ? 2 : 0) + kTile - 1) / kTile), columns((w + (fold ? 2 : 0) + kTile - 1) / kTile) {}
};

inline void input_line(const Lane (&d)[kWindow], Lane (&v)[kWindow]) {
  const Lane a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
  v[0] = 4 * d[0] - 5 * d[2] + d[4];
  v[1] = a + b;
  v[2] = a - b;
  v[3] = c + e;
  v[4] = c - e;
  v[5] = 4 * d[1] - 5 * d[3] + d[5];
}

inline void output_line(const Lane (&m)[kWindow], Lane (&y)[kTile]) {
  const Lane a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  y[0] = m[0] + a + c;
  y[1] = b + 2 * e;
  y[2] = a + 4 * c;
  y[3] = b + 8 * e + m[5];
}

inline void gradient_line(const Lane (&y)[kTile], Lane (&m)[kWindow]) {  // the adjoint of output_line
  const Lane a = y[0] + y[2], b = y[1] + y[3], c = y[0] + 4 * y[2], e = 2 * y[1] + 8 * y[3];
  m[0] = y[0];
  m[1] = a + b;
  m[2] = a - b;
  m[3] = c + e;
  m[4] = c - e;
  m[5] = y[3];
}

// Window of 6 x 6 voxels, which voxel(i, j, channel) loads, to 36 values a channel, `step` floats apart.
template <class Voxel>
inline void transform_window(Voxel voxel, Int channels, float* out, Int step) {
  for (Int c = 0; c < channels; c += kLane) {
    Lane half[kWindow][kWindow];
    for (int j = 0; j < kWindow; ++j) {
      Lane d[kWindow], v[kWindow];
      for (int i = 0; i < kWindow; ++i) d[i] = voxel(i, j, c);
      input_line(d, v);
      for (int i = 0; i < kWindow; ++i) half[i][j] = v[i];
    }
    for (int i = 0; i < kWindow; ++i) {
      Lane v[kWindow];
      input_line(half[i], v);
      for (int j = 0; j < kWindow; ++j) store(out + (i * kWindow + j) * step + c, v[j]);
    }
  }
}

// The window from (top, left), continued beyond the border.
void transform_input(const float* plane, const Grid& g, Int channels, Int top, Int left, bool clamp,
                     float* out, Int step) {
  if (top >= 0 && left >= 0 && top + kWindow <= g.height && left + kWindow <= g.width) {
    const float* corner = plane + (top * g.width + left) * channels;
    const Int line = g.width * channels;
    transform_window([=](Int i, Int j, Int c) { return load(corner + i * line + j * channels + c); }, channels,
                     out, step);
    return;
  }
  const float* at[kWindow][kWindow];
  for (int i = 0; i < kWindow; ++i)
    for (int j = 0; j < kWindow; ++j) {
      const Int y = std::clamp<Int>(top + i, 0, g.height - 1), x = std::clamp<Int>(left + j, 0, g.width - 1);
      const bool in = y == top + i && x == left + j;
      at[i][j] = in || clamp ? plane + (y * g.width + x) * channels : nullptr;
    }
  transform_window([&](Int i, Int j, Int c) { return at[i][j] ? load(at[i][j] + c) : Lane{}; }, channels, out,
                   step);
}

// 36 values a channel to a tile of 4 x 4 voxels, which voxel(i, j, channel, value) stores.
template <class Voxel>
inline void transform_tile(const float* m, Int step, Int channels, Voxel voxel) {
  for (Int c = 0; c < channels; c += kLane) {
    Lane half[kTile][kWindow];
    for (int j = 0; j < kWindow; ++j) {
      Lane d[kWindow], y[kTile];
      for (int i = 0; i < kWindow; ++i) d[i] = load(m + (i * kWindow + j) * step + c);
      output_line(d, y);
      for (int i = 0; i < kTile; ++i) half[i][j] = y[i];
    }
    for (int i = 0; i < kTile; ++i) {
      Lane out[kTile];
      output_line(half[i], out);
      for (int j = 0; j < kTile; ++j) voxel(i, j, c, out[j]);
    }
  }
}

// The tile at (top, left); what lies outside is folded onto the border or dropped.
void transform_output(const float* m, Int step, const Grid& g, Int channels, Int top, Int left,
                      float* plane) {
  if (top > 0 && left > 0 && top + kTile < g.height && left + kTile < g.width) {
    float* corner = plane + (top * g.width + left) * channels;
    const Int line = g.width * channels;
    transform_tile(m, step, channels,
                   [=](Int i, Int j, Int c, Lane v) { store(corner + i * line + j * channels + c, v); });
    return;
  }
  const bool fold = g.origin < 0;
  transform_tile(m, step, channels, [&](Int i, Int j, Int c, Lane v) {
    const Int y = std::clamp<Int>(top + i, 0, g.height - 1), x = std::clamp<Int>(left + j, 0, g.width - 1);
    float* target = plane + (y * g.width + x) * channels + c;
    if (fold && top + i <= g.height && left + j <= g.width) {
      const bool edge = y == 0 || x == 0 || y == g.height - 1 || x == g.width - 1;
      store(target, edge ? load(target) + v : v);
    } else if (!fold && top + i == y && left + j == x) {
      store(target, v);
    }
  });
}

// A tile of 4 x 4 voxels of the output's gradient, zero outside, to 36 values a channel in packed panels.
void transform_gradient(const float* plane, const Grid& g, Int channels, Int top, Int left, float* out,
                        Int step, Int row) {
  const bool inside = top + kTile <= g.height && left + kTile <= g.width;
  for (Int c = 0; c < channels; c += kLane) {
    Lane half[kWindow][kTile];
    for (int j = 0; j < kTile; ++j) {
      Lane d[kTile], v[kWindow];
      for (int i = 0; i < kTile; ++i) {
        const bool in = inside || (top + i < g.height && left + j < g.width);
        d[i] = in ? load(plane + ((top + i) * g.width + left + j) * channels + c) : Lane{};
      }
      gradient_line(d, v);
      for (int i = 0; i < kWindow; ++i) half[i][j] = v[i];
    }
    float* at = out + c / kPanel * kBlock * kPanel + row * kPanel + c % kPanel;
    for (int i = 0; i < kWindow; ++i) {
      Lane v[kWindow];
      gradient_line(half[i], v);
      for (int j = 0; j < kWindow; ++j) store(at + (i * kWindow + j) * step, v[j]);
    }
  }
}

void clear_edges(float* plane, Int height, Int width, Int channels) {
  const Int line = width * channels;
  std::memset(plane, 0, line * sizeof(float));
  std::memset(plane + (height - 1) * line, 0, line * sizeof(float));
  for (Int y = 1; y < height - 1; ++y) {
    std::memset(plane + y * line, 0, channels * sizeof(float));
    std::memset(plane + y * line + line - channels, 0, channels * sizeof(float));
  }
}

template <int Rows>
inline void product_rows(const float* v, Int ldv, const float* u, const Pairs& pairs, Int plane, Int freq,
                         Int panel, Int in, Int out_padded, float* m) {
  Wide acc[kRows][2] = {};
  Int offset = 0;
  for (Int p = pairs.first[plane]; p < pairs.first[plane + 1]; ++p, offset += in)
    multiply<Rows>(v + offset, ldv, 1,
                   u + ((pairs.tap[p] * kFreq + freq) * (out_padded / kPanel) + panel) * in * kPanel, in, acc);
  for (int i = 0; i < Rows; ++i) {
    *reinterpret_cast<Wide*>(m + i * out_padded) = acc[i][0];
    *reinterpret_cast<Wide*>(m + i * out_padded + kWide) = acc[i][1];
  }
}

template <int Rows>
inline void outer_rows(const float* v, Int ldv, const float* d, Int count, float* du, Int out_padded) {
  Wide acc[kRows][2] = {};
  multiply<Rows>(v, 1, ldv, d, count, acc);
  for (int i = 0; i < Rows; ++i) {
    *reinterpret_cast<Wide*>(du + i * out_padded) += acc[i][0];
    *reinterpret_cast<Wide*>(du + i * out_padded + kWide) += acc[i][1];
  }
}

// du (rows x panel) += v (count x rows, transposed) times d (count x panel, packed)
inline void outer(const float* v, Int rows, const float* d, Int count, float* du, Int out_padded) {
  Int c = 0;
  for (; c + 6 <= rows; c += 6) outer_rows<6>(v + c, rows, d, count, du + c * out_padded, out_padded);
  for (; c + 2 <= rows; c += 2) outer_rows<2>(v + c, rows, d, count, du + c * out_padded, out_padded);
  for (; c < rows; ++c) outer_rows<1>(v + c, rows, d, count, du + c * out_padded, out_padded);
}

inline Lane exponential(Lane x) {  // Source: Cephes expf; relative error 1e-7 for x from -87 to 0
  x = x < -87.0f ? Lane{} - 87.0f : x;
  const Lane scaled = x * 1.44269504f;
  const LaneInt n = __builtin_convertvector(scaled - 0.5f, LaneInt);  // rounds towards zero; x is not positive
  const Lane whole = __builtin_convertvector(n, Lane);
  const Lane r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Lane p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const LaneInt power = (n + 127) << 23;
  return p * reinterpret_cast<const Lane&>(power);
}

// A convolution of any size and step as a product of gathered windows with the weights.
struct Windows {
  Int depth, height, width, channels;              // of what is gathered
  Int out_depth, out_height, out_width;            // positions of windows
  Int kz, ky, kx, sz, sy, sx, clamp, halo_z, halo_y, halo_x;  // halo: positions beyond each border
  Int size() const { return kz * ky * kx * channels; }
  Int rows() const { return (out_depth + 2 * halo_z) * (out_height + 2 * halo_y); }  // of a sample
  Int columns() const { return out_width + 2 * halo_x; }
};

void gather(const float* x, const Windows& w, Int z0, Int y0, Int x0, float* out) {
  const Int left = x0 * w.sx - w.kx / 2;
  const bool inside = left >= 0 && left + w.kx <= w.width;
  for (Int i = 0; i < w.kz; ++i)
    for (Int j = 0; j < w.ky; ++j, out += w.kx * w.channels) {
      const Int z = z0 * w.sz + i - w.kz / 2, y = y0 * w.sy + j - w.ky / 2;
      if (!w.clamp && (z < 0 || z >= w.depth || y < 0 || y >= w.height)) {
        std::memset(out, 0, w.kx * w.channels * sizeof(float));
        continue;
      }
      const float* line =
          x + (std::clamp<Int>(z, 0, w.depth - 1) * w.height + std::clamp<Int>(y, 0, w.height - 1)) * w.width * w.channels;
      if (inside) {
        const float* from = line + left * w.channels;
        for (Int c = 0; c < w.kx * w.channels; ++c) out[c] = from[c];
        continue;
      }
      for (Int k = 0; k < w.kx; ++k)
        for (Int c = 0; c < w.channels; ++c) {
          const Int at = left + k;
          const bool in = w.clamp || (at >= 0 && at < w.width);
          out[k * w.channels + c] = in ? line[std::clamp<Int>(at, 0, w.width - 1) * w.channels + c] : 0.0f;
        }
    }
}

// Offset of the voxel at a window's position, those of the halo being folded onto the border.
inline Int position(const Windows& w, Int row, Int column, Int channels) {
  const Int height = w.out_height + 2 * w.halo_y;
  const Int z = std::clamp<Int>(row / height - w.halo_z, 0, w.out_depth - 1);
  const Int y = std::clamp<Int>(row % height - w.halo_y, 0, w.out_height - 1);
  return ((z * w.out_height + y) * w.out_width + std::clamp<Int>(column - w.halo_x, 0, w.out_width - 1)) * channels;
}

inline void gather_run(const float* x, const Windows& w, Int row, Int column, Int count, float* out) {
  const Int height = w.out_height + 2 * w.halo_y;
  for (Int t = 0; t < count; ++t)
    gather(x, w, row / height - w.halo_z, row % height - w.halo_y, column + t - w.halo_x, out + t * w.size());
}

// An axis of linear interpolation whose ends meet: output i lies between inputs low[i] and high[i].
struct Axis {
  std::vector<Int> low, high;
  std::vector<float> weight;  // of high
  Axis(Int from, Int to) : low(to), high(to), weight(to) {
    for (Int i = 0; i < to; ++i) {
      const double at = to > 1 ? double(i) * (from - 1) / (to - 1) : 0.0;
      low[i] = std::min<Int>(Int(at), from - 1);
      high[i] = std::min<Int>(low[i] + 1, from - 1);
      weight[i] = float(at - double(low[i]));
    }
  }
};

enum Activation : Int { kNone = 0, kRelu = 1, kElu = 2 };

inline Lane activate(Lane u, Int kind) {
  const Lane zero{};
  if (kind == kRelu) return u > 0.0f ? u : zero;
  if (kind == kElu) return u > 0.0f ? u : exponential(u < 0.0f ? u : zero) - 1.0f;
  return u;
}

inline Lane through(Lane grad, Lane y, Int kind) {  // gradient before the activation, from its output y
  const Lane zero{};
  if (kind == kRelu) return y > 0.0f ? grad : zero;
  if (kind == kElu) return y > 0.0f ? grad : grad * (y + 1.0f);
  return grad;
}

// Calls body(sample, first voxel, last voxel, part) for equal parts of each sample, in parallel.
template <class Body>
void over_parts(Int samples, Int voxels, Int parts, Int threads, Body body) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int job = 0; job < samples * parts; ++job) {
    const Int n = job / parts, part = job % parts;
    body(n, n * voxels + voxels * part / parts, n * voxels + voxels * (part + 1) / parts, part);
  }
}

constexpr Int kParts = 64;   // of a sample; fixed, so that sums do not depend on the number of threads
constexpr Int kChunk = 128;  // voxels summed in float before they join a double

// sums (samples, values) = the parts (samples, kParts, values) added up in their order.
void join_parts(const std::vector<double>& parts, double* sums, Int samples, Int values) {
  for (Int n = 0; n < samples; ++n)
    for (Int c = 0; c < values; ++c) {
      double sum = 0;
      for (Int part = 0; part < kParts; ++part) sum += parts[(n * kParts + part) * values + c];
      sums[n * values + c] = sum;
    }
}

}  // namespace

extern "C" {

Int panel_width() { return kPanel; }

// y = sum over pairs of the convolution of a plane of x with weights u (taps, 36, panels, in, panel), 3 x 3.
// clamp: x continues by its border, else by zeros. fold: y covers one voxel more on each side, added onto its
// border: the adjoint of clamping.
void convolve(const float* x, const float* u, float* y, const Int* first, const Int* source, const Int* tap,
              Int planes, Int height, Int width, Int in, Int out, Int clamp, Int fold, Int threads) {
  const Pairs pairs{first, source, tap};
  const Grid g(height, width, fold);
  const Int out_padded = padded(out);
  Int most = 0;
  for (Int p = 0; p < planes; ++p) most = std::max(most, first[p + 1] - first[p]);
  const Int bands = fold && (height + 2) % kTile == 1 ? 1 : std::max<Int>(1, g.rows / 8);
#pragma omp parallel num_threads(threads)
  {
    Buffer v(kFreq * (kBlock * most * in + kApart)), m(kFreq * (kBlock * out_padded + kApart));
    const Int m_step = kBlock * out_padded + kApart;
    if (fold) {
#pragma omp for schedule(static)
      for (Int p = 0; p < planes; ++p) clear_edges(y + p * height * width * out, height, width, out);
    }
#pragma omp for schedule(dynamic)
    for (Int job = 0; job < planes * bands; ++job) {
      const Int plane = job / bands, band = job % bands;
      const Int begin = g.rows * band / bands * g.columns, end = g.rows * (band + 1) / bands * g.columns;
      const Int n_pairs = first[plane + 1] - first[plane], ldv = n_pairs * in;
      const Int v_step = kBlock * ldv + kApart;
      for (Int tile = begin; tile < end; tile += kBlock) {
        const Int count = std::min<Int>(kBlock, end - tile);
        for (Int t = 0; t < count; ++t) {
          const Int top = (tile + t) / g.columns * kTile + g.origin, left = (tile + t) % g.columns * kTile + g.origin;
          for (Int p = 0; p < n_pairs; ++p)
            transform_input(x + source[first[plane] + p] * height * width * in, g, in, top - 1, left - 1, clamp,
                            v.data + t * ldv + p * in, v_step);
        }
        for (Int f = 0; f < kFreq; ++f)
          for (Int panel = 0; panel < out_padded / kPanel; ++panel)
            for (Int t = 0; t < count; t += kRows)
              product_rows<kRows>(v.data + f * v_step + t * ldv, ldv, u, pairs, plane, f, panel, in, out_padded,
                                  m.data + f * m_step + t * out_padded + panel * kPanel);
        for (Int t = 0; t < count; ++t)
          transform_output(m.data + t * out_padded, m_step, g, out,
                           (tile + t) / g.columns * kTile + g.origin, (tile + t) % g.columns * kTile + g.origin,
                           y + plane * height * width * out);
      }
    }
  }
}

// du (taps, 36, in, padded out) = gradient of the transformed weights, for y's gradient dy.
void weight_gradient(const float* x, const float* dy, float* du, const Int* first, const Int* source,
                     const Int* tap, Int taps, Int planes, Int height, Int width, Int in, Int out, Int clamp,
                     Int threads) {
  const Grid g(height, width, false);
  const Int out_padded = padded(out), size = taps * kFreq * in * out_padded;
  const Int tiles = g.rows * g.columns, blocks = (tiles + kBlock - 1) / kBlock, jobs = planes * blocks;
  std::vector<float*> sums(threads);
  std::vector<Buffer> stores;
  stores.reserve(threads);
  for (Int i = 0; i < threads; ++i) sums[i] = i ? (stores.emplace_back(size), stores.back().data) : du;
  std::memset(du, 0, size * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int share = 0; share < threads; ++share) {
    const Int v_step = kBlock * in + kApart, d_step = kBlock * out_padded + kApart;
    Buffer v(kFreq * v_step), d(kFreq * d_step);
    for (Int job = jobs * share / threads; job < jobs * (share + 1) / threads; ++job) {
      const Int plane = job / blocks, tile = job % blocks * kBlock, count = std::min<Int>(kBlock, tiles - tile);
      for (Int t = 0; t < count; ++t)
        transform_gradient(dy + plane * height * width * out, g, out, (tile + t) / g.columns * kTile,
                           (tile + t) % g.columns * kTile, d.data, d_step, t);
      for (Int p = first[plane]; p < first[plane + 1]; ++p) {
        for (Int t = 0; t < count; ++t)
          transform_input(x + source[p] * height * width * in, g, in, (tile + t) / g.columns * kTile - 1,
                          (tile + t) % g.columns * kTile - 1, clamp, v.data + t * in, v_step);
        for (Int f = 0; f < kFreq; ++f)
          for (Int panel = 0; panel < out_padded / kPanel; ++panel) {
            const float* right = d.data + f * d_step + panel * kBlock * kPanel;
            float* target = sums[share] + ((tap[p] * kFreq + f) * in) * out_padded + panel * kPanel;
            outer(v.data + f * v_step, in, right, count, target, out_padded);
          }
      }
    }
  }
  for (Int i = 1; i < threads; ++i)
    for (Int k = 0; k < size; ++k) du[k] += sums[i][k];
}

// y (samples, positions, out) = windows of x times w (panels, window, panel) + bias, which may be null.
// With a halo, y is added to and has to start at 0: the adjoint of clamping.
void gather_convolve(const float* x, const float* w, const float* bias, float* y, const Int* shape, Int samples, Int out,
                     Int threads) {
  Windows s;
  std::memcpy(&s, shape, sizeof s);
  const Int out_padded = padded(out), size = s.size(), in_sample = s.depth * s.height * s.width * s.channels;
  const bool fold = s.halo_z || s.halo_y || s.halo_x;
  const Int bands = fold ? 1 : 8;  // what a halo adds to a border comes from several rows
#pragma omp parallel num_threads(threads)
  {
    Buffer a(kBlock * size), m(kBlock * out_padded);
#pragma omp for schedule(dynamic)
    for (Int job = 0; job < samples * bands; ++job) {
      const Int n = job / bands, band = job % bands;
      float* target = y + n * s.out_depth * s.out_height * s.out_width * out;
      for (Int row = s.rows() * band / bands; row < s.rows() * (band + 1) / bands; ++row)
        for (Int column = 0; column < s.columns(); column += kBlock) {
          const Int count = std::min<Int>(kBlock, s.columns() - column);
          gather_run(x + n * in_sample, s, row, column, count, a.data);
          for (Int panel = 0; panel < out_padded / kPanel; ++panel)
            for (Int t = 0; t < count; t += kRows) {
              Wide acc[kRows][2] = {};
              multiply<kRows>(a.data + t * size, size, 1, w + panel * size * kPanel, size, acc);
              for (int i = 0; i < kRows; ++i)
                std::memcpy(m.data + (t + i) * out_padded + panel * kPanel, acc[i], sizeof acc[i]);
            }
          for (Int t = 0; t < count; ++t) {
            float* to = target + position(s, row, column + t, out);
            for (Int c = 0; c < out; ++c)
              to[c] = m.data[t * out_padded + c] + (fold ? to[c] : 0.0f) + (bias ? bias[c] : 0.0f);
          }
        }
    }
  }
}

// dw (window, padded out) = sum over positions of windows of x times dy.
void gather_weight_gradient(const float* x, const float* dy, float* dw, const Int* shape, Int samples, Int out,
                            Int threads) {
  Windows s;
  std::memcpy(&s, shape, sizeof s);
  const Int out_padded = padded(out), size = s.size(), total = size * out_padded;
  const Int in_sample = s.depth * s.height * s.width * s.channels, rows = samples * s.rows();
  std::vector<float> sums((threads - 1) * total, 0.0f);
  std::memset(dw, 0, total * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int share = 0; share < threads; ++share) {
    float* sum = share ? sums.data() + (share - 1) * total : dw;
    Buffer a(kBlock * size), d(kBlock * out_padded);
    for (Int job = rows * share / threads; job < rows * (share + 1) / threads; ++job) {
      const Int n = job / s.rows(), row = job % s.rows();
      const float* from = dy + n * s.out_depth * s.out_height * s.out_width * out;
      for (Int column = 0; column < s.columns(); column += kBlock) {
        const Int count = std::min<Int>(kBlock, s.columns() - column);
        gather_run(x + n * in_sample, s, row, column, count, a.data);
        for (Int t = 0; t < count; ++t) {
          const float* voxel = from + position(s, row, column + t, out);
          for (Int c = 0; c < out; ++c) d.data[(c / kPanel * kBlock + t) * kPanel + c % kPanel] = voxel[c];
        }
        for (Int panel = 0; panel < out_padded / kPanel; ++panel)
          outer(a.data, size, d.data + panel * kBlock * kPanel, count, sum + panel * kPanel, out_padded);
      }
    }
  }
  for (Int i = 1; i < threads; ++i)
    for (Int k = 0; k < total; ++k) dw[k] += sums[(i - 1) * total + k];
}

// out = base + low interpolated linearly in plane, corners aligned; base may be out itself.
void upsample_add(const float* base, const float* low, float* out, Int planes, Int low_height, Int low_width, Int height,
                  Int width, Int channels, Int threads) {
  const Axis ys(low_height, height), xs(low_width, width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int job = 0; job < planes * height; ++job) {
    const Int y = job % height;
    const float* plane = low + job / height * low_height * low_width * channels;
    const float *above = plane + ys.low[y] * low_width * channels, *below = plane + ys.high[y] * low_width * channels;
    const float b = ys.weight[y], a = 1 - b;
    for (Int x = 0; x < width; ++x) {
      const Int left = xs.low[x] * channels, right = xs.high[x] * channels, at = (job * width + x) * channels;
      const float q = xs.weight[x], p = 1 - q;
      for (Int c = 0; c < channels; c += kLane)
        store(out + at + c, load(base + at + c) + a * (p * load(above + left + c) + q * load(above + right + c)) +
                                b * (p * load(below + left + c) + q * load(below + right + c)));
    }
  }
}

// The adjoint of the interpolation: dlow from the gradient of what it was interpolated to.
void upsample_gradient(const float* grad, float* dlow, Int planes, Int low_height, Int low_width, Int height, Int width,
                       Int channels, Int threads) {
  const Axis ys(low_height, height), xs(low_width, width);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int plane = 0; plane < planes; ++plane) {
    const Int line = low_width * channels;
    float* to = dlow + plane * low_height * line;
    std::memset(to, 0, low_height * line * sizeof(float));
    Buffer row(line);
    for (Int y = 0; y < height; ++y) {
      std::memset(row.data, 0, line * sizeof(float));
      const float* from = grad + (plane * height + y) * width * channels;
      for (Int x = 0; x < width; ++x) {
        float *left = row.data + xs.low[x] * channels, *right = row.data + xs.high[x] * channels;
        const float q = xs.weight[x], p = 1 - q;
        for (Int c = 0; c < channels; c += kLane) {
          const Lane g = load(from + x * channels + c);
          store(left + c, load(left + c) + p * g);
          store(right + c, load(right + c) + q * g);
        }
      }
      float *above = to + ys.low[y] * line, *below = to + ys.high[y] * line;
      const float b = ys.weight[y], a = 1 - b;
      for (Int c = 0; c < line; c += kLane) {
        store(above + c, load(above + c) + a * load(row.data + c));
        store(below + c, load(below + c) + b * load(row.data + c));
      }
    }
  }
}

// sums (samples, 2, channels): of x and of its square, over the voxels of each sample.
void moments(const float* x, double* sums, Int samples, Int voxels, Int channels, Int threads) {
  std::vector<double> parts(samples * kParts * 2 * channels, 0.0);
  over_parts(samples, voxels, kParts, threads, [&](Int n, Int begin, Int end, Int part) {
    double* total = parts.data() + (n * kParts + part) * 2 * channels;
    for (Int c = 0; c < channels; c += kLane)
      for (Int chunk = begin; chunk < end; chunk += kChunk) {
        Lane sum{}, square{};
        for (Int i = chunk; i < std::min(end, chunk + kChunk); ++i) {
          const Lane value = load(x + i * channels + c);
          sum += value;
          square += value * value;
        }
        for (int k = 0; k < kLane; ++k) total[c + k] += sum[k], total[channels + c + k] += square[k];
      }
  });
  join_parts(parts, sums, samples, 2 * channels);
}

// y = activation(x * scale + shift + other), scale and shift (samples, channels); other may be null.
void scale_shift(const float* x, const float* other, const float* scale, const float* shift, float* y,
                 Int samples, Int voxels, Int channels, Int activation, Int threads) {
  over_parts(samples, voxels, kParts, threads, [&](Int n, Int begin, Int end, Int) {
    const float *a = scale + n * channels, *b = shift + n * channels;
    for (Int i = begin; i < end; ++i)
      for (Int c = 0; c < channels; c += kLane) {
        const Int at = i * channels + c;
        Lane u = load(x + at) * load(a + c) + load(b + c);
        if (other) u += load(other + at);
        store(y + at, activate(u, activation));
      }
  });
}

// sums (samples, 2, channels): of du and of du * x, where du is the gradient before the activation, stored
// unless null.
void scale_shift_sums(const float* grad, const float* y, const float* x, float* du, double* sums, Int samples,
                      Int voxels, Int channels, Int activation, Int threads) {
  std::vector<double> parts(samples * kParts * 2 * channels, 0.0);
  over_parts(samples, voxels, kParts, threads, [&](Int n, Int begin, Int end, Int part) {
    double* total = parts.data() + (n * kParts + part) * 2 * channels;
    for (Int chunk = begin; chunk < end; chunk += kChunk)
      for (Int c = 0; c < channels; c += kLane) {
        Lane sum{}, product{};
        for (Int i = chunk; i < std::min(end, chunk + kChunk); ++i) {
          const Int at = i * channels + c;
          const Lane d = through(load(grad + at), load(y + at), activation);
          if (du) store(du + at, d);
          sum += d;
          product += d * load(x + at);
        }
        for (int k = 0; k < kLane; ++k) total[c + k] += sum[k], total[channels + c + k] += product[k];
      }
  });
  join_parts(parts, sums, samples, 2 * channels);
}

// dx = du * scale + constant + slope * x; with y, du is `grad` before the activation, else `grad` itself.
void scale_shift_gradient(const float* grad, const float* y, const float* x, const float* scale,
                          const float* constant, const float* slope, float* dx, Int samples, Int voxels,
                          Int channels, Int activation, Int threads) {
  over_parts(samples, voxels, kParts, threads, [&](Int n, Int begin, Int end, Int) {
    const float *a = scale + n * channels, *b = constant + n * channels, *s = slope + n * channels;
    for (Int i = begin; i < end; ++i)
      for (Int c = 0; c < channels; c += kLane) {
        const Int at = i * channels + c;
        const Lane d = y ? through(load(grad + at), load(y + at), activation) : load(grad + at);
        store(dx + at, d * load(a + c) + load(b + c) + load(s + c) * load(x + at));
      }
  });
}

}  // extern "C"
