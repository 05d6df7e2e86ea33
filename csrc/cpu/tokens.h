// Addresses of the tokens of a call: in frames of x, in summaries, in thumbnails and in out.
//
// Functions are in an unnamed namespace, for the reason that vector.h gives.

#pragma once

#include "../tables.h"
#include "kernels.h"
#include "vector.h"

namespace stgp::cpu {

namespace {

// For each of `size` positions a run of rows or columns: start[i], ..., start[i] + count[i] - 1.
struct Runs {
  const int32_t *start, *count;

  Runs(const int32_t* tables, int64_t offset, int64_t size) : start(tables + offset), count(start + size) {}

  int64_t stop(int64_t i) const { return int64_t{start[i]} + count[i]; }
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The position from 0 to size that is nearest.
inline int64_t clamp(int64_t position, int64_t size) { return position < 0 ? 0 : position < size ? position : size; }

// Windows of the fused form are 2 x 2: window i has the rows, or columns, 2 * i, ..., window_end(i, size) - 1.
inline int64_t window_end(int64_t i, int64_t size) { return least(2 * i + 2, size); }

// A frame of tokens with any strides, which count elements.
template <typename T>
struct Frame {
  const T* data;
  int64_t row, col, channel;

  const T* at(int64_t r, int64_t c) const { return data + r * row + c * col; }
};

inline int64_t frame_offset(const Call& call, const Strides& s, int64_t frame) {
  return frame / call.T * s.video + frame % call.T * s.frame;
}

template <typename T>
Frame<T> frame_of_x(const Call& call, int64_t frame) {
  const Strides& s = call.x_strides;
  return {static_cast<const T*>(call.x) + frame_offset(call, s, frame), s.row, s.col, s.channel};
}

// A node of the general form, where summaries are stored in full.
template <typename T>
Frame<T> frame_of_node(const int32_t* tables, const Call& call, int64_t node) {
  if (node >= 0) return frame_of_x<T>(call, node);
  const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH];
  return {static_cast<const T*>(call.scratch) + (-1 - node) * H * W * call.C, W * call.C, call.C, 1};
}

// Thumbnail `slot` of the fused form, (h, w, C); nullptr for slot -1.
template <typename T>
T* thumbnail_at(const int32_t* tables, const Call& call, int64_t slot) {
  if (slot < 0) return nullptr;
  const int64_t h = (int64_t{tables[H_HEIGHT]} + 1) / 2, w = (int64_t{tables[H_WIDTH]} + 1) / 2;
  return static_cast<T*>(call.thumbnails != nullptr ? call.thumbnails : call.scratch) + slot * h * w * call.C;
}

// The node of an entry of the fused form: the mosaic of four thumbnails, or a frame of x, which is a single tile.
template <typename T>
struct Image {
  const T* tiles[4];
  int64_t h, w;               // rows and columns of a tile
  int64_t row, col, channel;  // strides

  static Image of(const int32_t* tables, const Call& call, const int32_t* entry) {
    const int64_t H = tables[H_HEIGHT], W = tables[H_WIDTH], h = (H + 1) / 2, w = (W + 1) / 2;
    if (entry[E_NODE] >= 0) {
      const Frame<T> frame = frame_of_x<T>(call, entry[E_NODE]);
      return {{frame.data, frame.data, frame.data, frame.data}, H, W, frame.row, frame.col, frame.channel};
    }
    Image mosaic{{}, h, w, w * call.C, call.C, 1};
    for (int k = 0; k < 4; ++k) mosaic.tiles[k] = thumbnail_at<T>(tables, call, entry[E_SOURCES + k]);
    return mosaic;
  }

  const T* at(int64_t r, int64_t c) const { return at_row(r).at(c); }

  // Row r of the tokens, which may continue in another tile.
  struct Row {
    const T *left, *right;
    int64_t w, col;

    const T* at(int64_t c) const { return c < w ? left + c * col : right + (c - w) * col; }
  };

  Row at_row(int64_t r) const {
    const int64_t below = r >= h, offset = (r - below * h) * row;
    return {tiles[2 * below] + offset, tiles[2 * below + 1] + offset, w, col};
  }
};

// Returns `token` if its channels are contiguous, else a copy at position `place` of the gathered tokens.
template <typename T>
inline const T* gather(const T* token, int64_t channel_stride, int64_t C, const Workspace& w, int64_t place) {
  if (channel_stride == 1) return token;
  T* copy = reinterpret_cast<T*>(w.gathered) + place * C;
  for (int64_t c = 0; c < C; ++c) copy[c] = token[c * channel_stride];
  return copy;
}

// The first place of tokens of x. Place 0 is for a token of out, or of the gradient of the result.
constexpr int64_t FIRST_TAP = 1;

// Returns the first token of a frame of out.
template <typename T>
T* frame_of_out(const Call& call, int64_t frame) {
  return static_cast<T*>(call.out) + frame_offset(call, call.out_strides, frame);
}

// A token of a frame of out. Kernels write its channels to `buffer`, and finish() moves them to the token if they are
// elsewhere.
template <typename T>
struct OutToken {
  T* token;
  T* buffer;
  int64_t channel_stride;

  OutToken(const Call& call, T* frame, int64_t row, int64_t col, const Workspace& w) {
    const Strides& s = call.out_strides;
    token = frame + row * s.row + col * s.col;
    channel_stride = s.channel;
    buffer = s.channel == 1 ? token : reinterpret_cast<T*>(w.gathered);
  }

  void finish(int64_t C) const {
    if (buffer == token) return;
    for (int64_t c = 0; c < C; ++c) token[c * channel_stride] = buffer[c];
  }
};

}  // namespace

}  // namespace stgp::cpu
