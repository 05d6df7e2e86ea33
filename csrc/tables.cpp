#include "tables.h"

#include <algorithm>
#include <vector>

#include "grid_pool.h"

namespace stgp {

namespace {

// Returns whether the tables hold `count` words from `offset` on, behind the header.
bool inside(int64_t offset, int64_t count, int64_t words) {
  return offset >= HEADER_WORDS && count >= 0 && offset + count <= words;
}

bool all_between(const int32_t* values, int64_t count, int64_t low, int64_t high) {
  return std::all_of(values, values + count, [=](int64_t value) { return low <= value && value < high; });
}

// Returns whether there are `count` starts and counts at `offset` whose runs are not empty and from `low` to `high`.
bool runs_fit(const int32_t* t, int64_t words, int64_t offset, int64_t count, int64_t low, int64_t high) {
  if (!inside(offset, 2 * count, words)) return false;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = t[offset + i], length = t[offset + count + i];
    if (start < low || length < 1 || start + length > high) return false;
  }
  return true;
}

const char* check_levels(const int32_t* t, int64_t words) {
  const int64_t H = t[H_HEIGHT], W = t[H_WIDTH];
  int64_t summaries = 0, taken = 0;  // by the levels so far; no two of them have words in common
  for (int l = 0; l < t[H_NUM_LEVELS]; ++l) {
    const int32_t* level = t + t[H_LEVELS] + l * LEVEL_WORDS;
    const int64_t rows = level[L_ROWS], cols = level[L_COLS], count = level[L_COUNT];
    if (rows < 1 || cols < 1 || count < 1 || level[L_FIRST] != summaries) return "a level's sizes are out of range";
    if (rows * cols > words || !inside(level[L_SOURCES], count * rows * cols, words)) {
      return "a level's sources are out of range";
    }
    taken += count * rows * cols + 2 * (H + W);
    if (taken > words) return "levels have words in common";
    if (!all_between(t + level[L_SOURCES], count * rows * cols, -summaries, t[H_FRAMES])) {
      return "a level's sources are out of range";
    }
    if (!runs_fit(t, words, level[L_ROW_RUNS], H, 0, rows * H) ||
        !runs_fit(t, words, level[L_COL_RUNS], W, 0, cols * W)) {
      return "a level's runs are out of range";
    }
    summaries += count;
  }
  return summaries == t[H_SUMMARIES] ? nullptr : "the levels do not hold all summaries";
}

// Returns the tiles that a mosaic's entry reads, as a set of bits 2 * row + col: for the live cells of its thumbnail,
// if `live` is not nullptr, and for the windows of a pooled frame.
int32_t tiles_read(const int32_t* t, const int32_t* live, bool pooled) {
  const int64_t H = t[H_HEIGHT], W = t[H_WIDTH], h = (H + 1) / 2, w = (W + 1) / 2;
  int32_t tiles = 0;
  for (int64_t i = 0; i < h; ++i) {
    const int64_t cells = live != nullptr ? live[i] : 0;
    const int64_t windows = pooled && i < t[H_OUT_ROWS] ? t[H_OUT_COLS] : 0;
    if (cells == 0 && windows == 0) continue;
    const int64_t top = cells > 0 && H % 2 == 1 && i > 0 ? 2 * i - 1 : 2 * i;
    const int64_t bottom = std::min(2 * i + 2, H), right = std::min(2 * std::max(cells, windows), W);
    for (int64_t row = top / h; row <= (bottom - 1) / h; ++row) {
      for (int64_t col = 0; col <= (right - 1) / w; ++col) tiles |= 1 << (2 * row + col);
    }
  }
  return tiles;
}

const char* check_stages(const int32_t* t, int64_t words) {
  if (t[H_NUM_STAGES] == 0) return nullptr;
  const int64_t h = (t[H_HEIGHT] + 1) / 2, w = (t[H_WIDTH] + 1) / 2;
  const int32_t of_windows = tiles_read(t, nullptr, true);
  // For each offset of live counts that an entry has: 1, the tiles that these counts read from bit 1 on, and from bit 5
  // on the tiles for windows too. Many entries have the same counts, which are looked at once.
  std::vector<uint16_t> tiles_of(words);
  int64_t entries = 0, live_rows = 0;
  for (int s = 0; s < t[H_NUM_STAGES]; ++s) {
    const int32_t* stage = t + t[H_STAGES] + s * STAGE_WORDS;
    const int64_t count = stage[S_COUNT], walked = stage[S_SHRUNK];
    if (count < 1 || walked < 0 || walked > count || stage[S_AFTER] < 0 || stage[S_AFTER] > s ||
        !inside(stage[S_ENTRIES], count * ENTRY_WORDS, words)) {
      return "a stage's entries are out of range";
    }
    entries += count;
    if (entries * ENTRY_WORDS > words) return "stages have entries in common";
    for (int64_t e = 0; e < count; ++e) {
      const int32_t* entry = t + stage[S_ENTRIES] + e * ENTRY_WORDS;
      const bool mosaic = stage[S_MOSAIC] != 0;
      if (!all_between(entry + E_NODE, 1, mosaic ? -words : 0, mosaic ? 0 : t[H_FRAMES]) ||
          !all_between(entry + E_TARGET, 1, -1, t[H_FRAMES]) ||
          !all_between(entry + E_SLOT, 1, e < walked ? 0 : -1, e < walked ? t[H_SLOTS] : 0) ||
          !all_between(entry + E_SOURCES, 4, -1, t[H_SLOTS]) || !inside(entry[E_LIVE], h, words)) {
        return "an entry is out of range";
      }
      uint16_t& known = tiles_of[entry[E_LIVE]];
      if (known == 0) {
        const int32_t* live = t + entry[E_LIVE];
        if (!all_between(live, h, 0, w + 1)) return "an entry is out of range";
        if (++live_rows * h > words) return "rows of live cells overlap";
        known = static_cast<uint16_t>(1 | tiles_read(t, live, false) << 1 | tiles_read(t, live, true) << 5);
      }
      const bool pooled = entry[E_TARGET] >= 0;
      const int32_t needed = entry[E_SLOT] >= 0 ? known >> (pooled ? 5 : 1) : pooled ? of_windows : 0;
      for (int n = 0; mosaic && n < 4; ++n) {
        if ((needed >> n & 1) != 0 && entry[E_SOURCES + n] < 0) return "a mosaic lacks a tile";
      }
    }
  }
  return nullptr;
}

// Returns whether there are `size` starts and counts at `offset`, whose runs are empty or between 0 and `count`.
bool inverse_runs_fit(const int32_t* t, int64_t words, int64_t offset, int64_t size, int64_t count) {
  if (!inside(offset, 2 * size, words)) return false;
  for (int64_t p = 0; p < size; ++p) {
    const int64_t start = t[offset + p], length = t[offset + size + p];
    if (length < 0 || (length > 0 && (start < 0 || start + length > count))) return false;
  }
  return true;
}

const char* check_gradient(const int32_t* t, int64_t words) {
  if (t[H_GRADIENT] == 0) return nullptr;
  const int64_t H = t[H_HEIGHT], W = t[H_WIDTH], nodes = int64_t{t[H_FRAMES]} + t[H_SUMMARIES];
  if (!inside(t[H_GRADIENT], G_LEVELS + 2 * int64_t{t[H_NUM_LEVELS]}, words)) return "the gradient is out of range";
  const int32_t* gradient = t + t[H_GRADIENT];
  if (!inside(gradient[G_CONSUMERS], nodes + 1, words)) return "the consumers are out of range";
  if (!inside(gradient[G_ENDS], nodes, words) || !all_between(t + gradient[G_ENDS], nodes, -1, t[H_FRAMES])) {
    return "the output frames of the nodes are out of range";
  }
  const int32_t* starts = t + gradient[G_CONSUMERS];
  for (int64_t c = 0; c < nodes; ++c) {
    const int64_t length = int64_t{starts[c + 1]} - starts[c];
    if (length % CONSUMER_WORDS != 0 || !inside(starts[c], length, words)) return "the consumers are out of range";
    for (const int32_t* consumer = t + starts[c]; consumer < t + starts[c + 1]; consumer += CONSUMER_WORDS) {
      if (consumer[C_LEVEL] < 0 || consumer[C_LEVEL] >= t[H_NUM_LEVELS]) return "a consumer is out of range";
      const int32_t* level = t + t[H_LEVELS] + consumer[C_LEVEL] * LEVEL_WORDS;
      const int64_t s = consumer[C_SUMMARY] - int64_t{level[L_FIRST]};
      // A summary is read by later levels only. `summary` is the node's number as a summary, negative for a frame.
      const int64_t summary = c - t[H_FRAMES];
      if (s < 0 || s >= level[L_COUNT] || consumer[C_TILE] < 0 ||
          consumer[C_TILE] >= int64_t{level[L_ROWS]} * level[L_COLS] || summary >= level[L_FIRST]) {
        return "a consumer is out of range";
      }
    }
  }
  for (int s = 0; s < t[H_NUM_STAGES]; ++s) {
    const int32_t* stage = t + t[H_STAGES] + s * STAGE_WORDS;
    for (int64_t e = 0; e < stage[S_COUNT]; ++e) {
      const int32_t node = t[stage[S_ENTRIES] + e * ENTRY_WORDS + E_NODE];
      if (node < -int64_t{t[H_SUMMARIES]}) return "an entry is of no summary";
    }
  }
  int64_t taken = 0;
  for (int l = 0; l < t[H_NUM_LEVELS]; ++l) {
    const int32_t* level = t + t[H_LEVELS] + l * LEVEL_WORDS;
    taken += 2 * (level[L_ROWS] * H + level[L_COLS] * W);
    if (taken > words) return "the inverse runs of levels have words in common";
    if (!inverse_runs_fit(t, words, gradient[G_LEVELS + 2 * l], level[L_ROWS] * H, H) ||
        !inverse_runs_fit(t, words, gradient[G_LEVELS + 2 * l + 1], level[L_COLS] * W, W)) {
      return "the inverse runs of a level are out of range";
    }
  }
  if (!inverse_runs_fit(t, words, gradient[G_WINDOW_ROWS], H, t[H_OUT_ROWS]) ||
      !inverse_runs_fit(t, words, gradient[G_WINDOW_COLS], W, t[H_OUT_COLS])) {
    return "the inverse runs of the windows are out of range";
  }
  return nullptr;
}

}  // namespace

const char* check_tables(const int32_t* t, int64_t words) {
  if (t == nullptr || words < HEADER_WORDS || t[H_MAGIC] != MAGIC) return "these are no tables of a plan";
  if (t[H_VERSION] != VERSION) return "the tables have another version";
  if (t[H_WORDS] != words) return "the tables have another length";
  // The limit of sizes: rows, columns and slots are fewer. Products of two of them are far below the limit of int64.
  constexpr int64_t MOST = 1 << 24;
  if (!all_between(t + H_HEIGHT, 4, 1, MOST) || !all_between(t + H_FRAMES, 1, 0, words) ||
      !all_between(t + H_SUMMARIES, 1, 0, words) || !all_between(t + H_NUM_LEVELS, 1, 0, words) ||
      !all_between(t + H_NUM_STAGES, 1, 0, words) || !all_between(t + H_SLOTS, 1, 0, MOST)) {
    return "a size in the tables is out of range";
  }
  if (!inside(t[H_OUTPUTS], t[H_FRAMES], words) ||
      !all_between(t + t[H_OUTPUTS], t[H_FRAMES], -int64_t{t[H_SUMMARIES]}, t[H_FRAMES])) {
    return "the output nodes are out of range";
  }
  const int64_t H = t[H_HEIGHT], W = t[H_WIDTH], OH = t[H_OUT_ROWS], OW = t[H_OUT_COLS];
  if (!runs_fit(t, words, t[H_WINDOW_ROWS], OH, -MOST, 2 * MOST) ||
      !runs_fit(t, words, t[H_WINDOW_COLS], OW, -MOST, 2 * MOST)) {
    return "the windows are out of range";
  }
  const int32_t *heights = t + t[H_WINDOW_ROWS] + OH, *widths = t + t[H_WINDOW_COLS] + OW;
  const int64_t largest = int64_t{*std::max_element(heights, heights + OH)} * *std::max_element(widths, widths + OW);
  if (largest != t[H_LARGEST_WINDOW]) return "the largest window has another size";
  if (!inside(t[H_LEVELS], int64_t{t[H_NUM_LEVELS]} * LEVEL_WORDS, words)) return "the levels are out of range";
  if (const char* wrong = check_levels(t, words)) return wrong;
  if (!inside(t[H_STAGES], int64_t{t[H_NUM_STAGES]} * STAGE_WORDS, words)) return "the stages are out of range";
  if (t[H_NUM_STAGES] > 0 && (OH > (H + 1) / 2 || OW > (W + 1) / 2)) return "there are more windows than pairs";
  if (const char* wrong = check_stages(t, words)) return wrong;
  return check_gradient(t, words);
}

}  // namespace stgp
