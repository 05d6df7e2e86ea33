// The form of a plan's tables: one array of int32 words, little-endian in files. An offset is the index of a word, from
// 0. stgridpool_kernels/plan/tables.py writes tables.
//
// A *node* is a value that a frame holds at some time, as one integer: t >= 0 is frame t of x, ~s (that is -1 - s) is
// summary s. A summary is the mosaic that replaces a target frame.
//
// All tables describe the computation in the general form. They also have the fused form if windows are 2 x 2 at stride
// 2 and all grids are 2 x 2 and shrunk by area.
//
// Tables of a chunk of streams have the fused form alone, and no levels: some of their frames are replaced by summaries
// of thumbnails that earlier chunks left in their slots, at Call::thumbnails.
//
// General form: all summaries are stored in full, level by level, rounded to the dtype of x. The output frames are
// computed from them and from x.
//
//   outputs[frames]         the node of each output frame: its frame of x, or a summary
//   levels[][LEVEL_WORDS]   in the order they run
//   window rows             OH starts, then OH counts: output row i reads rows start[i], ..., start[i] + count[i] - 1.
//                           Rows before 0 and from H on are zero padding (norm 0)
//   window cols             the same for OW and W
//
// Fused form: only *thumbnails* of nodes are stored, h x w = ceil(H / 2) x ceil(W / 2) cells in x's dtype. Cell (i, j)
// is the mean over rows 2i and 2i + 1 (and 2i - 1 where H is odd and i > 0) and columns 2j and 2j + 1 (and 2j - 1 where
// W is odd and j > 0) that are inside the frame. A summary is the mosaic of four thumbnails, row-major, cropped to
// H x W; it is never stored itself.
//
//   stages[][STAGE_WORDS]   run one after the other, or side by side where S_AFTER allows it; entries of a stage run
//                           in any order
//   entries[][ENTRY_WORDS]  a node: it is pooled into `target`, and shrunk into thumbnail slot `slot`
//
// Gradient section, in tables for the functions ..._backward: the readers of each node, row and column. Each node
// that is shrunk has its own slot then, and each frame and each summary has an entry.
//
//   consumers               F + S + 1 offsets: node number n of 0, ..., F - 1, ~0, ..., ~(S - 1) is read by the triples
//                           (summary, level, tile) from offset n up to offset n + 1
//   ends                    F + S frames: the output frame that holds node number n, or -1
//   window inverses         H starts, then H counts: row r is read by output rows start[r], ...,
//                           start[r] + count[r] - 1; the same for W
//   level inverses          the same for the rows and columns of a level's mosaics: rows x H, cols x W

#pragma once

#include <cstdint>

namespace stgp {

constexpr int32_t MAGIC = 0x50475453;  // "STGP"
constexpr int32_t VERSION = 4;         // of the tables, and of the private ops that take them

// The first words of all tables.
enum Header : int32_t {
  H_MAGIC,
  H_VERSION,
  H_WORDS,   // number of words in the array
  H_FRAMES,  // number of frames of all videos together
  H_HEIGHT,  // H x W: number of tokens of a frame
  H_WIDTH,
  H_OUT_ROWS,  // OH x OW: number of tokens of a pooled frame
  H_OUT_COLS,
  H_LARGEST_WINDOW,  // number of tokens of the largest window, padding included
  H_SUMMARIES,       // number of summaries
  H_OUTPUTS,         // offset of `outputs`
  H_LEVELS,          // offset of `levels`
  H_NUM_LEVELS,      // number of levels that have summaries
  H_WINDOW_ROWS,     // offset of the window rows
  H_WINDOW_COLS,     // offset of the window cols
  H_STAGES,          // offset of `stages`
  H_NUM_STAGES,      // 0: there is no fused form
  H_SLOTS,           // number of thumbnail slots
  H_GRADIENT,        // offset of the gradient section; 0: there is none
  HEADER_WORDS,
};

// Offsets that the gradient section starts with.
enum Gradient : int32_t {
  G_CONSUMERS,
  G_ENDS,
  G_WINDOW_ROWS,  // the window inverses
  G_WINDOW_COLS,
  G_LEVELS,  // two offsets for every level: for its rows, for its columns
};

// A tile of a summary's mosaic, which reads a node.
enum Consumer : int32_t {
  C_SUMMARY,
  C_LEVEL,  // number of the summary's entry in `levels`
  C_TILE,   // number of the tile in the mosaic, row-major
  CONSUMER_WORDS,
};

// A level makes summaries first, ..., first + count - 1. Summary token (r, c) is the mean over a run of rows and one of
// columns of the mosaic in which the nodes of `sources`, each H x W, are laid out row-major.
enum Level : int32_t {
  L_ROWS,  // rows and columns of the grid
  L_COLS,
  L_FIRST,
  L_COUNT,
  L_SOURCES,   // offset of count x rows x cols nodes
  L_ROW_RUNS,  // offset of H starts and H counts
  L_COL_RUNS,  // offset of W starts and W counts
  LEVEL_WORDS,
};

// A stage is a set of entries that may be computed at the same time.
enum Stage : int32_t {
  S_MOSAIC,   // 1: the nodes are summaries, 0: frames of x
  S_ENTRIES,  // offset of its entries
  S_COUNT,    // number of entries
  S_SHRUNK,   // number of entries with a thumbnail; they come first
  S_AFTER,    // number of stages, from the first, that must be complete before this one begins
  STAGE_WORDS,
};

// An entry is a node with what is computed from it.
enum Entry : int32_t {
  E_NODE,
  E_TARGET,   // frame of out that the node is pooled into, or -1
  E_SLOT,     // where its thumbnail is stored, or -1
  E_LIVE,     // offset of h counts: the number of live cells in each row of its thumbnail, from the first
  E_SOURCES,  // slots of the four thumbnails that a summary is tiled from; -1 for one without live cells
  ENTRY_WORDS = E_SOURCES + 4,
};

}  // namespace stgp
