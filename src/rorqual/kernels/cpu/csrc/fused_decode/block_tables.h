// Where the tokens of a decode step lie in the paged KV cache.
#pragma once

#include <algorithm>
#include <bit>

#include "../dtypes.h"

namespace {

// Row r of a step is the last of the lengths[r] tokens in the blocks of row r of `tables`.
struct BlockTables {
    const int32_t *tables;
    i64 table_stride, block;  // block: tokens per block, a power of two
    const int32_t *lengths;

    const int32_t *table(i64 r) const { return tables + r * table_stride; }
    i64 shift() const { return std::countr_zero(uint64_t(block)); }
    // The slot of row r's token, in tokens from the start of the store.
    i64 slot(i64 r) const {
        const i64 position = lengths[r] - 1;
        return i64(table(r)[position >> shift()]) * block + (position & (block - 1));
    }
    i64 longest(i64 rows) const { return *std::max_element(lengths, lengths + rows); }
    // Whether row r is the next token of row r - 1's sequence. Sequences never share the block they write to.
    bool continues(i64 r) const {
        const i64 blocks = (lengths[r - 1] + block - 1) / block;
        return lengths[r] == lengths[r - 1] + 1 && std::equal(table(r), table(r) + blocks, table(r - 1));
    }
};

}  // namespace
