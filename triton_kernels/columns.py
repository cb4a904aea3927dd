"""Element by element passes over a row: chunks that programs take, and a body of 128-bit accesses between a short head
and a tail.

Not yet run on a GPU.

Where V is no multiple of 8, rows start anywhere. What is computed element by element does not depend on how columns are
dealt out (nothing is added across columns, every multiply-add is an explicit ``fma``), so the cut may follow the
memory: up to 7 columns before the first 16-byte boundary of the row that is written, then whole tiles without a mask,
then a masked tail. Sums cannot do that, or their bits would follow the alignment (row_state.py).
"""

import triton
import triton.language as tl


@triton.jit
def head_of(pointer, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Columns before the first 16-byte boundary; SIZE is that of an element in bytes."""
    address = pointer.to(tl.int64)
    return ((VECTOR - (address // SIZE) % VECTOR) % VECTOR).to(tl.int32)


@triton.jit
def chunk_bounds(chunk, head, width, CHUNK: tl.constexpr):
    """First and last column of a chunk; the first one begins at 0, the others at a boundary."""
    begin = tl.where(chunk == 0, 0, head + chunk * CHUNK)
    return begin, tl.minimum(head + (chunk + 1) * CHUNK, width)
