// The form of a plan's tables: one array of int32, little-endian in files. Words count from 0; an offset is the number
// of the word where something starts. `stgridpool_kernels/plan/tables.py` writes it.
//
// A *content* is what a frame holds at some time, as one integer: t >= 0 is frame t of x, ~s (that is -1 - s) is
// summary s. A summary is the mosaic that replaces a target frame.
//
// Every set of tables describes the computation in the general form; where windows are 2 x 2 at stride 2 and all grids
// are 2 x 2 and shrunk by area, also in the fused form.
//
// Tables of a chunk of streams have no levels: they describe frames of which some are replaced by summaries of
// miniatures that earlier chunks left in their slots, and so the fused form alone. Call::miniatures is where the slots
// are then.
//
// General form: summaries of each level in turn, in full, rounded to the dtype of x; then every frame as it ends.
//
//   final[frames]           the content that each frame ends with
//   levels[][LEVEL_WORDS]   in the order they run
//   window rows             OH starts, then OH counts: output row i covers rows start[i], ..., start[i] + count[i] - 1,
//                           of which those before 0 and from H on are zero padding (norm 0)
//   window cols             the same of OW and W
//
// Fused form: only *miniatures* of contents are stored, h x w = ceil(H / 2) x ceil(W / 2) cells in x's dtype. Cell (i,
// j) is the mean of rows 2i and 2i + 1 (and of row 2i - 1 where H is odd and i > 0) by columns 2j and 2j + 1 (and 2j -
// 1), as far as they are inside the frame. A summary is the mosaic of four miniatures, row-major, cropped to H x W; it
// is never stored itself.
//
//   steps[][STEP_WORDS]     run one after the other, or side by side as far as S_AFTER allows; the entries of a step in
//   any
//                           order
//   entries[][ENTRY_WORDS]  a content: it is pooled into `target`, and it is shrunk into miniature slot `slot`

// Gradient section, in tables for the functions ..._backward: the converse of the above. Each content that is shrunk
// has a slot of its own then, and each frame and each summary an entry.
//
//   feeds                   F + S + 1 offsets: contents 0, ..., F - 1, ~0, ..., ~(S - 1) go where the triples (summary,
//                           level, tile) from one offset up to the next say
//   window covers           H starts, then H counts: row r is covered by output rows start[r], ..., start[r] + count[r]
//                           - 1; the same of W
//   level covers            the same of the rows and columns of a level's mosaics: rows x H, cols x W

#pragma once

#include <cstdint>

namespace stgp {

constexpr int32_t MAGIC = 0x50475453;  // "STGP"
constexpr int32_t VERSION = 2;

// The first words of all tables.
enum Header : int32_t {
  H_MAGIC,
  H_VERSION,
  H_WORDS,   // of all tables
  H_FRAMES,  // of all videos
  H_HEIGHT,  // H, W: tokens of a frame
  H_WIDTH,
  H_OUT_ROWS,  // OH, OW: tokens of a pooled frame
  H_OUT_COLS,
  H_LARGEST_WINDOW,  // tokens and padding of the largest window
  H_SUMMARIES,       // number of summaries
  H_FINAL,           // offset of `final`
  H_LEVELS,          // offset of `levels`
  H_NUM_LEVELS,      // levels that have summaries
  H_WINDOW_ROWS,     // offsets of the windows
  H_WINDOW_COLS,
  H_STEPS,      // offset of `steps`
  H_NUM_STEPS,  // 0: there is no fused form
  H_SLOTS,      // miniatures that are kept at a time
  H_GRADIENT,   // offset of the gradient section; 0: there is none
  HEADER_WORDS,
};

// The gradient section: offsets.
enum Gradient : int32_t {
  G_FEEDS,
  G_WINDOW_ROWS,
  G_WINDOW_COLS,
  G_LEVELS,  // two words for every level: of its rows, of its columns
};

// A place that a content goes to.
enum Feed : int32_t {
  F_SUMMARY,
  F_LEVEL,  // its place among the levels here
  F_TILE,   // of its mosaic, row-major
  FEED_WORDS,
};

// Summaries first, ..., first + count - 1. Summary token (r, c) is the mean over a run of rows and a run of columns of
// the mosaic that lays the contents of `sources` row-major, each H x W.
enum Level : int32_t {
  L_ROWS,  // of the grid
  L_COLS,
  L_FIRST,
  L_COUNT,
  L_SOURCES,   // offset of count x rows x cols contents
  L_ROW_RUNS,  // offset of H starts and H counts
  L_COL_RUNS,  // offset of W starts and W counts
  LEVEL_WORDS,
};

enum Step : int32_t {
  S_MOSAIC,   // 1: the contents are summaries, 0: frames of x
  S_ENTRIES,  // offset of its entries
  S_COUNT,    // number of entries
  S_WALKED,   // how many of them have a miniature; these come first
  S_AFTER,    // how many steps, from the first, have to be complete before this one begins
  STEP_WORDS,
};

enum Entry : int32_t {
  E_CONTENT,
  E_TARGET,   // frame of out that the content is pooled into, or -1
  E_SLOT,     // where its miniature is stored, or -1
  E_NEEDED,   // offset of h counts: so many cells of each row of its miniature are needed, from the first
  E_SOURCES,  // slots of the four miniatures that a summary is tiled from; -1 where none is needed
  ENTRY_WORDS = E_SOURCES + 4,
};

}  // namespace stgp
