// Reads the image and the labels of a patch from a box of raw voxels: turned, looked up, bilinear, nearest.
//
// Where a pixel reads depends on its place in plane alone, so places are found once for a block of rows and
// shared by the block's sections. They are those of torch to the last bit, hence the labels are, too; so the
// compiler must not fuse a product with a sum (-ffp-contract=off).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Int = std::int64_t;
using Offset = std::int32_t;

constexpr int kLane = 8;
typedef float Lane __attribute__((vector_size(kLane * sizeof(float)), aligned(4), may_alias));
typedef double Pairs __attribute__((vector_size(kLane * sizeof(float)), may_alias));
typedef Offset Picks __attribute__((vector_size(kLane * sizeof(float))));

constexpr Int kBlock = 2048;  // pixels; what all sections read for them stays in the second-level cache
constexpr Int kTurnedRows = 8;  // written side by side where rows are read across memory

struct View {  // voxels along the patch's axes: the first one, the steps between two, how many there are
  Int origin, step_z, step_y, step_x, sections, height, width;
};

struct Places {  // of the pixels of a block
  explicit Places(Int n) : corner(n), nearest(n), right(n), down(n) {}
  std::vector<Offset> corner, nearest;  // upper left of the four voxels around, in the box; nearest label
  std::vector<float> right, down;       // shares of the right and the lower ones of the four
};

inline Lane load(const float* p) { return *reinterpret_cast<const Lane*>(p); }

inline double pair(const float* p) {  // two neighbours in one load
  double both;
  std::memcpy(&both, p, sizeof both);
  return both;
}

inline Lane shuffled(Pairs a, Pairs b, bool second) {
  const Lane x = reinterpret_cast<Lane&>(a), y = reinterpret_cast<Lane&>(b);
#ifdef __clang__
  return second ? __builtin_shufflevector(x, y, 1, 3, 9, 11, 5, 7, 13, 15)
                : __builtin_shufflevector(x, y, 0, 2, 8, 10, 4, 6, 12, 14);
#else
  return second ? __builtin_shuffle(x, y, Picks{1, 3, 9, 11, 5, 7, 13, 15})
                : __builtin_shuffle(x, y, Picks{0, 2, 8, 10, 4, 6, 12, 14});
#endif
}

// Between the left and the right neighbour of eight pixels.
inline Lane along_x(const float* row, const Offset* at, Lane share) {
  const Pairs a = {pair(row + at[0]), pair(row + at[1]), pair(row + at[4]), pair(row + at[5])};
  const Pairs b = {pair(row + at[2]), pair(row + at[3]), pair(row + at[6]), pair(row + at[7])};
  const Lane left = shuffled(a, b, false), right = shuffled(a, b, true);
  return left + share * (right - left);
}

inline Lane along_both(const float* from, Int width, const Places& at, Int i) {
  const Lane share = load(&at.right[i]);
  const Lane upper = along_x(from, &at.corner[i], share), lower = along_x(from + width, &at.corner[i], share);
  return upper + load(&at.down[i]) * (lower - upper);
}

void read_linear(const float* from, Int width, const Places& at, Int n, float* into) {
  Int i = 0;
  for (; i + kLane <= n; i += kLane) *reinterpret_cast<Lane*>(into + i) = along_both(from, width, at, i);
  if (i == n) return;
  const Lane rest = along_both(from, width, at, i);
  std::memcpy(into + i, &rest, (n - i) * sizeof(float));
}

template <class Label>
void read_nearest(const void* labels, Int origin, const Places& at, Int n, void* out, Int begin) {
  const Label* from = static_cast<const Label*>(labels) + origin;
  Label* into = static_cast<Label*>(out) + begin;
  for (Int i = 0; i < n; ++i) into[i] = from[at.nearest[i]];
}

// Along one axis, from where a pixel reads: the first of two voxels and the second one's share, as grid_sample
// rounds them on its way from voxels to the range from -1 to 1 and back; and the nearest voxel.
struct Axis {
  explicit Axis(Int size)
      : last(size - 1), to_grid(2.0 / (size - 1)), end(size - 1) {}
  float last, to_grid;
  Offset end;

  Offset nearest(float place) const { return std::clamp(static_cast<Offset>(place + 0.5f), 0, end); }
  float within(float place) const {
    const float grid = place * to_grid - 1.0f;
    return std::min(std::max((grid + 1.0f) * (last / 2), 0.0f), last);
  }
  Offset first(float within) const { return std::min(static_cast<Offset>(within), end - 1); }
};

struct Map {  // by[axis][0] * y + by[axis][1] + by[axis][2] * x; y and x from the middle, displaced before
  const float *by, *moves;
  Int height, width;
};

void find_places(const Map& map, const View& labels, Int row, Int start, Places& places) {
  const Axis along_y(labels.height), along_x(labels.width);
  const Offset step_y = labels.step_y, step_x = labels.step_x, box_width = labels.width;
  const float a = map.by[0], b = map.by[1], c = map.by[2], d = map.by[3], e = map.by[4], f = map.by[5];
  const float y = row - (map.height - 1) / 2.0f, middle = (map.width - 1) / 2.0f;
  Offset *corner = &places.corner[start], *nearest = &places.nearest[start];
  float *right = &places.right[start], *down = &places.down[start];
  const auto find = [=](Offset i, float at_y, float at_x) {
    const float from_y = (at_y * a + b) + at_x * c, from_x = (at_y * d + e) + at_x * f;
    nearest[i] = along_y.nearest(from_y) * step_y + along_x.nearest(from_x) * step_x;
    const float in_y = along_y.within(from_y), in_x = along_x.within(from_x);
    const Offset top = along_y.first(in_y), left = along_x.first(in_x);
    corner[i] = top * box_width + left;
    down[i] = in_y - top;
    right[i] = in_x - left;
  };
  const Offset width = map.width;
  if (!map.moves) {
#pragma GCC ivdep
    for (Offset i = 0; i < width; ++i) find(i, y, i - middle);
    return;
  }
  const float *by_y = map.moves + row * width, *by_x = by_y + map.height * width;
#pragma GCC ivdep
  for (Offset i = 0; i < width; ++i) find(i, by_y[i] + y, by_x[i] + (i - middle));
}

View view_of(const Int* v) { return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]}; }

}  // namespace

extern "C" {

// Grey values through a table of 256, of all sections or of each one, into dense sections.
void look_up(const std::uint8_t* image, const Int* view, const float* tables, Int n_tables, float* out, Int) {
  const View v = view_of(view);
  const Int rows = v.step_x == 1 || v.step_x == -1 ? 1 : kTurnedRows;
  for (Int z = 0; z < v.sections; ++z) {
    const float* table = tables + (n_tables > 1 ? 256 * z : 0);
    for (Int y = 0; y < v.height; y += rows) {
      const std::uint8_t* from = image + v.origin + z * v.step_z + y * v.step_y;
      float* into = out + (z * v.height + y) * v.width;
      const Int n = std::min(rows, v.height - y);
      for (Int x = 0; x < v.width; ++x)
        for (Int k = 0; k < n; ++k) into[k * v.width + x] = table[from[k * v.step_y + x * v.step_x]];
    }
  }
}

// A run of sections; `box` is dense, at least 2 x 2, `view` is that of the labels, of `label_bytes` each.
void sample(const float* box, const void* labels, const Int* view, Int label_bytes, const float* moves,
            const float* by, Int height, Int width, float* out, void* out_labels, Int) {
  const View v = view_of(view);
  const Map map = {by, moves, height, width};
  const Int rows = std::max<Int>(1, kBlock / width);
  Places at(rows * width + kLane);  // what fills the last lane reads the first voxel
  for (Int row = 0; row < height; row += rows) {
    const Int n_rows = std::min(rows, height - row);
    for (Int k = 0; k < n_rows; ++k) find_places(map, v, row + k, k * width, at);
    for (Int z = 0; z < v.sections; ++z) {
      const Int begin = (z * height + row) * width, n = n_rows * width, origin = v.origin + z * v.step_z;
      read_linear(box + z * v.height * v.width, v.width, at, n, out + begin);
      const auto read = label_bytes == 1   ? read_nearest<std::uint8_t>
                        : label_bytes == 2 ? read_nearest<std::uint16_t>
                        : label_bytes == 4 ? read_nearest<std::uint32_t>
                                           : read_nearest<std::uint64_t>;
      read(labels, origin, at, n, out_labels, begin);
    }
  }
}

}  // extern "C"
