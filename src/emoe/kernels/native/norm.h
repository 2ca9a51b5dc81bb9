/* Root mean square norms of rows. Sums in float32, in 16 lanes: a row's bits depend on the row alone. */

enum { ROUNDED = 0, WHOLE = 1, OFFSET = 2 }; /* round(x) * w; round(x * w); round(x * (1 + w)) */

INLINE void norm_row(int type, int form, long size, float epsilon, const char *x, const char *weight, char *out)
{
    const long bytes = type_bytes(type), whole = size / LANES * LANES;
    char rest[64] __attribute__((aligned(64))) = {0}, last[64] __attribute__((aligned(64))) = {0};
    vf squares = {0};
    memcpy(rest, x + whole * bytes, (size_t)((size - whole) * bytes));
    for (long c = 0; c < size; c += LANES) {
        const vf v = load16(type, c < whole ? x + c * bytes : rest);
        squares += v * v;
    }
    const float by = 1.0f / sqrtf(sum16(squares) / (float)size + epsilon);
    memcpy(last, weight + whole * bytes, (size_t)((size - whole) * bytes));
    for (long c = 0; c < size; c += LANES) {
        vf v = load16(type, c < whole ? x + c * bytes : rest) * by, w = load16(type, c < whole ? weight + c * bytes : last);
        if (form == ROUNDED) v = rounded(type, v);
        if (form == OFFSET) w = w + 1.0f;
        v = rounded(type, v * w);
        if (c < whole) {
            store16(type, out + c * bytes, v);
        } else {
            store16(type, rest, v);
            memcpy(out + c * bytes, rest, (size_t)((size - whole) * bytes));
        }
    }
}
