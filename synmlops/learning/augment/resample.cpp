// Reads the image and the labels of a patch from a box of raw voxels: turned, looked up, bilinear, nearest.
//
// Where a pixel reads depends on its place in plane alone, so places are found once for a tile of the plane and
// shared by all sections. Of each section, the grey values around the tile are turned and looked up into a
// window that stays in the cache: what leaves it are the raw voxels and the patch.
//
// Places are those of torch to the last bit, hence the labels are, too; so the compiler must not fuse a product
// with a sum (-ffp-contract=off).
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

constexpr Int kSide = 64;       // of a tile, in pixels
constexpr Int kTurnedRows = 8;  // written side by side where rows are read across memory

struct View {  // voxels along the patch's axes: the first one, the steps between two, how many there are
  Int origin, step_z, step_y, step_x, sections, height, width;
};

struct Image {
  const void* voxels;  // uint8, to be looked up, uint16 or float
  Int bytes;           // of a voxel
  View view;
  const float* tables;  // of 256, one for all sections or one for each
  Int n_tables;
};

struct Places {  // of a row of a tile; a lane may reach beyond the row
  Offset top[kSide], left[kSide];                  // first of the rows and columns around, in the box
  Offset corner[kSide + kLane];                    // upper left of the four voxels around, in the window
  Offset nearest[kSide];                           // label
  float down[kSide + kLane], right[kSide + kLane];  // shares of the lower and the right voxels
};

struct Window {  // the part of the box that a tile reads
  Offset top, left, height, width;
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
  const Lane share = load(at.right + i);
  const Lane upper = along_x(from, at.corner + i, share), lower = along_x(from + width, at.corner + i, share);
  return upper + load(at.down + i) * (lower - upper);
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
  Label* __restrict__ into = static_cast<Label*>(out) + begin;
  for (Int i = 0; i < n; ++i) into[i] = from[at.nearest[i]];
}

// Along one axis of the box: the nearest voxel, and a place as grid_sample rounds it on its way to the range
// from -1 to 1 and back.
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
  Offset first(float within) const { return std::min(static_cast<Offset>(within), end - 1); }  // of two
};

struct Map {  // by[axis][0] * y + by[axis][1] + by[axis][2] * x; y and x from the middle, displaced before
  const float *by, *moves;
  Int height, width;
};

void find_row(const Map& map, const View& labels, Int row, Int start, Int n, Places& places) {
  const Axis along_y(labels.height), along_x(labels.width);
  const Offset step_y = labels.step_y, step_x = labels.step_x;
  const float a = map.by[0], b = map.by[1], c = map.by[2], d = map.by[3], e = map.by[4], f = map.by[5];
  const float y = row - (map.height - 1) / 2.0f, x = start - (map.width - 1) / 2.0f;
  Places* at = &places;
  const auto find = [=](Offset i, float from_middle_y, float from_middle_x) {
    const float in_y = (from_middle_y * a + b) + from_middle_x * c;
    const float in_x = (from_middle_y * d + e) + from_middle_x * f;
    at->nearest[i] = along_y.nearest(in_y) * step_y + along_x.nearest(in_x) * step_x;
    const float y = along_y.within(in_y), x = along_x.within(in_x);
    at->top[i] = along_y.first(y);
    at->left[i] = along_x.first(x);
    at->down[i] = y - at->top[i];
    at->right[i] = x - at->left[i];
  };
  if (!map.moves) {
#pragma GCC ivdep
    for (Offset i = 0; i < n; ++i) find(i, y, x + i);
    return;
  }
  const float *by_y = map.moves + row * map.width + start, *by_x = by_y + map.height * map.width;
#pragma GCC ivdep
  for (Offset i = 0; i < n; ++i) find(i, by_y[i] + y, by_x[i] + (x + i));
}

// What the rows of a tile read; their corners are then those in it.
Window settle(Int rows, Offset n, Places* tile) {
  Offset low_y = tile->top[0], high_y = low_y, low_x = tile->left[0], high_x = low_x;
  for (Int k = 0; k < rows; ++k)
    for (Offset i = 0; i < n; ++i) {
      low_y = std::min(low_y, tile[k].top[i]), high_y = std::max(high_y, tile[k].top[i]);
      low_x = std::min(low_x, tile[k].left[i]), high_x = std::max(high_x, tile[k].left[i]);
    }
  const Window window = {low_y, low_x, high_y + 2 - low_y, high_x + 2 - low_x};
  for (Int k = 0; k < rows; ++k)
    for (Offset i = 0; i < n; ++i)
      tile[k].corner[i] = (tile[k].top[i] - low_y) * window.width + (tile[k].left[i] - low_x);
  return window;
}

// Grey values of a window, dense; `grey` makes one of a voxel.
template <class Voxel, class Grey>
void fill(const Voxel* from, Int step_y, Int step_x, const Window& w, Grey grey, float* __restrict__ into) {
  const Int rows = step_x == 1 || step_x == -1 ? 1 : kTurnedRows;
  Int top = 0;
  if (rows > 1)
    for (; top + rows <= w.height; top += rows)
      for (Int x = 0; x < w.width; ++x)
        for (Int y = top; y < top + kTurnedRows; ++y) into[y * w.width + x] = grey(from[y * step_y + x * step_x]);
  for (Int y = top; y < w.height; ++y)
    for (Int x = 0; x < w.width; ++x) into[y * w.width + x] = grey(from[y * step_y + x * step_x]);
}

void fill_from(const Image& image, Int z, const Window& w, float* into) {
  const View& v = image.view;
  const Int at = v.origin + z * v.step_z + w.top * v.step_y + w.left * v.step_x;
  const auto fill_with = [&](const auto* voxels, auto grey) { fill(voxels + at, v.step_y, v.step_x, w, grey, into); };
  const float* table = image.tables + (image.n_tables > 1 ? 256 * z : 0);
  if (image.bytes == 1)
    fill_with(static_cast<const std::uint8_t*>(image.voxels), [table](std::uint8_t voxel) { return table[voxel]; });
  else if (image.bytes == 2)
    fill_with(static_cast<const std::uint16_t*>(image.voxels), [](std::uint16_t voxel) { return float(voxel); });
  else
    fill_with(static_cast<const float*>(image.voxels), [](float voxel) { return voxel; });
}

View view_of(const Int* v) { return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]}; }

}  // namespace

extern "C" {

// Sections that are only turned and looked up.
void turn(const void* image, Int bytes, const Int* view, const float* tables, Int n_tables, float* out, Int) {
  const Image from = {image, bytes, view_of(view), tables, n_tables};
  const View& v = from.view;
  const Window all = {0, 0, static_cast<Offset>(v.height), static_cast<Offset>(v.width)};
  for (Int z = 0; z < v.sections; ++z) fill_from(from, z, all, out + z * v.height * v.width);
}

// A run of sections, of a box that is at least 2 x 2 in plane.
void sample(const void* image, Int bytes, const Int* image_view, const float* tables, Int n_tables,
            const void* labels, Int label_bytes, const Int* label_view, const float* moves, const float* by,
            Int height, Int width, float* out, void* out_labels, Int) {
  const Image from = {image, bytes, view_of(image_view), tables, n_tables};
  const View v = view_of(label_view);
  const Map map = {by, moves, height, width};
  const auto read_labels = label_bytes == 1   ? read_nearest<std::uint8_t>
                           : label_bytes == 2 ? read_nearest<std::uint16_t>
                           : label_bytes == 4 ? read_nearest<std::uint32_t>
                                              : read_nearest<std::uint64_t>;
  std::vector<Places> tile(kSide);
  std::vector<float> grey;
  for (Int top = 0; top < height; top += kSide)
    for (Int left = 0; left < width; left += kSide) {
      const Int rows = std::min(kSide, height - top), n = std::min(kSide, width - left);
      for (Int k = 0; k < rows; ++k) find_row(map, v, top + k, left, n, tile[k]);
      const Window window = settle(rows, n, tile.data());
      grey.resize(std::max<std::size_t>(grey.size(), window.height * window.width));
      for (Int z = 0; z < v.sections; ++z) {
        fill_from(from, z, window, grey.data());
        for (Int k = 0; k < rows; ++k) {
          const Int begin = (z * height + top + k) * width + left;
          read_linear(grey.data(), window.width, tile[k], n, out + begin);
          read_labels(labels, v.origin + z * v.step_z, tile[k], n, out_labels, begin);
        }
      }
    }
}

}  // extern "C"
