/* Multiplies packed matrices with vectors, and unpacks them, on CPUs.

   A packed matrix has, for each row, a mask of one bit a weight (bit c % 8 of byte c / 8 is column c; a row is
   filled up to whole words of 32 columns) and its kept values, one after the other. `offsets[row]` is where a
   row's values begin. Values are bfloat16, float16, float32, or codes of 8 or 4 bits (two a byte, the first one in
   the low half) that a scale, one for each `group` columns of a row, turns into weights.

   Every path works through a row in chunks of 64 columns: it expands the chunk's values to their columns, zeros
   between them, and multiplies them with up to 8 vectors. Codes are multiplied as integers: the vectors are then
   rounded to 16 bits, with a scale of their own for each group. Which path is taken is decided by the caller.

   No path reads beyond the `count` values, whatever mask and offsets say: each chunk's bits are counted before its
   values are read. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define ARM 1
#include <arm_neon.h>
#endif

enum kind { BF16, FP16, FP32, INT8, INT4, KINDS };
enum path { PLAIN, NEON, AVX2, AVX512, AVX512_BF16, PATHS };

/* How a path wants the vectors: as they are in bfloat16, in float32, in float32 with the even columns of every 32
   before the odd ones, in 16-bit integers, or in these as high and low bytes, 64 of each in turn. */
enum form { X_BF16, X_FLOAT, X_EVEN_ODD, X_INT, X_BYTES };

#define CHUNK 64
#define MOST_VECTORS 8
/* Values are fetched this many bytes ahead of their use, into the first cache and into the second. One core of a server
   waits for memory most of the time; without this it reads hardly more than half of what it can. */
#define AHEAD 1024
#define FAR_AHEAD 4096
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

struct task {
    const void *values;
    const uint8_t *mask;
    const int64_t *offsets;
    const uint16_t *scale; /* (rows, groups), float16; codes only */
    int64_t count, rows, width, stride, chunks, group, groups; /* stride: bytes of mask a row */
    const void *x;       /* (vectors, x_stride), in the form of the path, zeros beyond the width */
    const float *x_scale; /* (vectors, groups); codes only */
    const float *x_sum;   /* (vectors, groups): the sums of the vectors, for X_BYTES */
    int64_t x_stride;
};

/* The dot products of one row with the vectors; false where mask and offsets contradict each other. */
typedef int (*dot_function)(const struct task *, int64_t row, float *y);
/* One row unpacked: values of 2 or 4 bytes as they are, codes as int8. */
typedef int (*expand_function)(const struct task *, int64_t row, void *out);

INLINE uint64_t bits(const uint8_t *mask, int64_t chunk, int64_t stride) {
    uint64_t word = 0;
    if (8 * chunk + 8 <= stride)
        memcpy(&word, mask + 8 * chunk, 8);
    else
        memcpy(&word, mask + 8 * chunk, 4);
    return word;
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023, word;
    if (exponent == 0) {
        float value = ldexpf((float)fraction, -24);
        return sign ? -value : value;
    }
    word = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float bfloat_to_float(uint16_t bfloat) {
    uint32_t word = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* To the nearest, ties to even, as torch does. */
INLINE uint16_t float_to_bfloat(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

/* Where a row's values are; false unless they lie within the array. */
INLINE int row_bounds(const struct task *t, int64_t row, int64_t *begin, int64_t *end) {
    *begin = t->offsets[row];
    *end = t->offsets[row + 1];
    return 0 <= *begin && *begin <= *end && *end <= t->count;
}

/* The four instances of a dot product that are compiled: for 1, 2, 4 and 8 vectors. */
#define INSTANCE(NAME, TARGET, N)                                                                                      \
    TARGET static int NAME##_##N(const struct task *t, int64_t row, float *y) { return NAME(t, row, y, N); }
#define INSTANCES(NAME, TARGET)                                                                                        \
    INSTANCE(NAME, TARGET, 1)                                                                                          \
    INSTANCE(NAME, TARGET, 2)                                                                                          \
    INSTANCE(NAME, TARGET, 4)                                                                                          \
    INSTANCE(NAME, TARGET, 8)
#define ALL(NAME) {NAME##_1, NAME##_2, NAME##_4, NAME##_8}

/* The frame of all: the row's chunks, each with its bits `m`, and `at`, the index of its first value. */
#define FOR_EACH_CHUNK(t, row)                                                                                         \
    int64_t at, end;                                                                                                   \
    if (!row_bounds(t, row, &at, &end))                                                                                \
        return 0;                                                                                                      \
    const uint8_t *mask = (t)->mask + (row) * (t)->stride;                                                             \
    for (int64_t j = 0; j < (t)->chunks; j++)
#define NEXT_BITS(t)                                                                                                   \
    uint64_t m = bits(mask, j, (t)->stride);                                                                           \
    int used = __builtin_popcountll(m);                                                                                \
    if (used > end - at)                                                                                               \
        return 0;
#define FETCH_AHEAD(VALUES, BYTES)                                                                                     \
    (__builtin_prefetch((const char *)(VALUES) + (BYTES) + AHEAD),                                                     \
     __builtin_prefetch((const char *)(VALUES) + (BYTES) + FAR_AHEAD, 0, 2))

/* --- Plain C ------------------------------------------------------------------------------------------------- */

INLINE float plain_value(const struct task *t, int kind, int64_t at) {
    if (kind == BF16)
        return bfloat_to_float(((const uint16_t *)t->values)[at]);
    if (kind == FP16)
        return half_to_float(((const uint16_t *)t->values)[at]);
    return ((const float *)t->values)[at];
}

INLINE int plain_code(const struct task *t, int kind, int64_t at) {
    if (kind == INT8)
        return ((const int8_t *)t->values)[at];
    return 2 * (((const uint8_t *)t->values)[at / 2] >> 4 * (at & 1) & 15) - 15;
}

INLINE int plain_dot(const struct task *t, int64_t row, float *y, int n, int kind) {
    float sums[MOST_VECTORS] = {0};
    int32_t parts[MOST_VECTORS] = {0};
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        for (; m; m &= m - 1, at++) {
            int64_t column = CHUNK * j + __builtin_ctzll(m);
            for (int i = 0; i < n; i++)
                if (kind >= INT8)
                    parts[i] += plain_code(t, kind, at) * ((const int16_t *)t->x)[i * t->x_stride + column];
                else
                    sums[i] += plain_value(t, kind, at) * ((const float *)t->x)[i * t->x_stride + column];
        }
        if (kind >= INT8 && ((CHUNK * (j + 1)) % t->group == 0 || j + 1 == t->chunks)) {
            int64_t g = CHUNK * j / t->group;
            float scale = half_to_float(t->scale[row * t->groups + g]);
            for (int i = 0; i < n; i++) {
                sums[i] += (float)parts[i] * (scale * t->x_scale[i * t->groups + g]);
                parts[i] = 0;
            }
        }
    }
    memcpy(y, sums, n * sizeof(float));
    return 1;
}

INLINE int plain_expand(const struct task *t, int64_t row, void *out, int kind) {
    int size = kind == FP32 ? 4 : kind >= INT8 ? 1 : 2;
    memset(out, 0, size * t->width);
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        for (; m; m &= m - 1, at++) {
            int64_t column = CHUNK * j + __builtin_ctzll(m);
            if (column >= t->width)
                return 0;
            if (kind == FP32)
                ((uint32_t *)out)[column] = ((const uint32_t *)t->values)[at];
            else if (kind >= INT8)
                ((int8_t *)out)[column] = (int8_t)plain_code(t, kind, at);
            else
                ((uint16_t *)out)[column] = ((const uint16_t *)t->values)[at];
        }
    }
    return 1;
}

#define PLAIN_KIND(KIND)                                                                                               \
    INLINE int plain_##KIND(const struct task *t, int64_t row, float *y, int n) {                                      \
        return plain_dot(t, row, y, n, KIND);                                                                          \
    }                                                                                                                  \
    INSTANCES(plain_##KIND, )                                                                                          \
    static int plain_expand_##KIND(const struct task *t, int64_t row, void *out) {                                     \
        return plain_expand(t, row, out, KIND);                                                                        \
    }
PLAIN_KIND(BF16)
PLAIN_KIND(FP16)
PLAIN_KIND(FP32)
PLAIN_KIND(INT8)
PLAIN_KIND(INT4)

/* --- What vector units of 128 and 256 bits share ---------------------------------------------------------------- */

#if defined(X86) || defined(ARM)

/* For each byte of a mask, which of the next 8 values comes to which of 8 columns; 0x80 for a zero. The first
   table moves values of one byte, the second values of two, the third these to the upper half of four. */
static uint8_t places[256][8] __attribute__((aligned(64)));
static uint8_t places_of_two[256][16] __attribute__((aligned(64)));
static uint8_t places_of_bfloat[256][32] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_places(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int column = 0, next = 0; column < 8; column++) {
            int kept = byte >> column & 1;
            places[byte][column] = kept ? next : 0x80;
            places_of_two[byte][2 * column] = kept ? 2 * next : 0x80;
            places_of_two[byte][2 * column + 1] = kept ? 2 * next + 1 : 0x80;
            memset(places_of_bfloat[byte] + 4 * column, 0x80, 2);
            memcpy(places_of_bfloat[byte] + 4 * column + 2, places_of_two[byte] + 2 * column, 2);
            next += kept;
        }
}

/* Byte k: how many bits are set in the bytes before k of a word. */
INLINE uint64_t counts_before(uint64_t m) {
    m -= m >> 1 & 0x5555555555555555u;
    m = (m & 0x3333333333333333u) + (m >> 2 & 0x3333333333333333u);
    m = (m + (m >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return m * 0x0101010101010101u << 8;
}

/* The chunk's values of `size` bytes: in place where 8 more than it needs can be read, else copied to `copy`. */
INLINE const uint8_t *readable(const struct task *t, int64_t at, int used, int size, uint8_t *copy) {
    const uint8_t *values = (const uint8_t *)t->values + at * size;
    if (t->count - at >= CHUNK + 8)
        return values;
    memcpy(copy, values, used * size);
    return copy;
}

/* A chunk's codes of 4 bits, one a byte and as integers from -15 to 15, still one after the other. */
INLINE const uint8_t *four_bits(const struct task *t, int64_t at, int used, uint8_t *codes) {
    const uint8_t *values = (const uint8_t *)t->values;
    for (int k = 0; k < used; k++)
        codes[k] = 2 * (values[(at + k) / 2] >> 4 * ((at + k) & 1) & 15) - 15;
    return codes;
}

#endif

/* --- AVX2 ------------------------------------------------------------------------------------------------------- */

#ifdef X86

#define FOR_AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))

FOR_AVX2 INLINE float sum_256(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The 8 columns of byte k of m, from the chunk's values. */
FOR_AVX2 INLINE __m128i avx2_two(uint64_t m, uint64_t before, int k, const uint8_t *values) {
    __m128i next = _mm_loadu_si128((const __m128i *)(values + 2 * (before >> 8 * k & 255)));
    return _mm_shuffle_epi8(next, _mm_load_si128((const __m128i *)places_of_two[m >> 8 * k & 255]));
}

/* bfloat16 as float32: each value goes to the upper half of its column. */
FOR_AVX2 INLINE __m256 avx2_bfloat(uint64_t m, uint64_t before, int k, const uint8_t *values) {
    __m128i next = _mm_loadu_si128((const __m128i *)(values + 2 * (before >> 8 * k & 255)));
    __m256i place = _mm256_load_si256((const __m256i *)places_of_bfloat[m >> 8 * k & 255]);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(next), place));
}

FOR_AVX2 INLINE __m256i avx2_four(uint64_t m, uint64_t before, int k, const uint8_t *values) {
    __m256i next = _mm256_loadu_si256((const __m256i *)(values + 4 * (before >> 8 * k & 255)));
    __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)places[m >> 8 * k & 255]));
    return _mm256_andnot_si256(_mm256_srai_epi32(place, 31), _mm256_permutevar8x32_epi32(next, place));
}

FOR_AVX2 INLINE __m128i avx2_one(uint64_t m, uint64_t before, int k, const uint8_t *values) {
    __m128i next = _mm_loadl_epi64((const __m128i *)(values + (before >> 8 * k & 255)));
    return _mm_shuffle_epi8(next, _mm_loadl_epi64((const __m128i *)places[m >> 8 * k & 255]));
}

/* A chunk's codes of 4 bits, 8 at a time: spread to bytes by pdep. */
FOR_AVX2 INLINE const uint8_t *avx2_four_bits(const struct task *t, int64_t at, int used, uint8_t *codes) {
    const uint8_t *values = (const uint8_t *)t->values;
    if (t->count - at < CHUNK + 16)
        return four_bits(t, at, used, codes);
    for (int k = 0; k < used; k += 8) {
        uint64_t word;
        memcpy(&word, values + (at + k) / 2, 8);
        word = _pdep_u64(word >> 4 * (at & 1) & 0xffffffffu, 0x0f0f0f0f0f0f0f0fu);
        word = (2 * word + 0x7171717171717171u) ^ 0x8080808080808080u; /* 2 c - 15 in every byte, without borrows */
        memcpy(codes + k, &word, 8);
    }
    return codes;
}

FOR_AVX2 INLINE int avx2_float_dot(const struct task *t, int64_t row, float *y, int n, int kind) {
    __m256 sums[MOST_VECTORS];
    uint8_t copy[4 * (CHUNK + 8)];
    int size = kind == FP32 ? 4 : 2;
    UNROLL
    for (int i = 0; i < n; i++)
        sums[i] = _mm256_setzero_ps();
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        uint64_t before = counts_before(m);
        const uint8_t *values = readable(t, at, used, size, copy);
        const float *x = (const float *)t->x + CHUNK * j;
        FETCH_AHEAD(values, 0);
        UNROLL
        for (int k = 0; k < 8; k++) {
            __m256 w;
            if (kind == FP32)
                w = _mm256_castsi256_ps(avx2_four(m, before, k, values));
            else if (kind == FP16)
                w = _mm256_cvtph_ps(avx2_two(m, before, k, values));
            else
                w = avx2_bfloat(m, before, k, values);
            UNROLL
            for (int i = 0; i < n; i++)
                sums[i] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i * t->x_stride + 8 * k), sums[i]);
        }
        at += used;
    }
    UNROLL
    for (int i = 0; i < n; i++)
        y[i] = sum_256(sums[i]);
    return 1;
}

FOR_AVX2 INLINE int avx2_code_dot(const struct task *t, int64_t row, float *y, int n, int kind) {
    __m256 sums[MOST_VECTORS];
    __m256i parts[MOST_VECTORS];
    uint8_t copy[CHUNK + 8];
    int64_t per_group = t->group / CHUNK;
    UNROLL
    for (int i = 0; i < n; i++) {
        sums[i] = _mm256_setzero_ps();
        parts[i] = _mm256_setzero_si256();
    }
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        uint64_t before = counts_before(m);
        const uint8_t *values =
            kind == INT8 ? readable(t, at, used, 1, copy) : avx2_four_bits(t, at, used, copy);
        const int16_t *x = (const int16_t *)t->x + CHUNK * j;
        FETCH_AHEAD((const uint8_t *)t->values, kind == INT8 ? at : at / 2);
        UNROLL
        for (int k = 0; k < 8; k += 2) {
            __m256i w = _mm256_cvtepi8_epi16(
                _mm_unpacklo_epi64(avx2_one(m, before, k, values), avx2_one(m, before, k + 1, values)));
            UNROLL
            for (int i = 0; i < n; i++)
                parts[i] = _mm256_add_epi32(
                    parts[i],
                    _mm256_madd_epi16(w, _mm256_loadu_si256((const __m256i *)(x + i * t->x_stride + 8 * k))));
        }
        at += used;
        if ((j + 1) % per_group == 0 || j + 1 == t->chunks) {
            int64_t g = j / per_group;
            float scale = half_to_float(t->scale[row * t->groups + g]);
            UNROLL
            for (int i = 0; i < n; i++) {
                __m256 both = _mm256_set1_ps(scale * t->x_scale[i * t->groups + g]);
                sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(parts[i]), both, sums[i]);
                parts[i] = _mm256_setzero_si256();
            }
        }
    }
    UNROLL
    for (int i = 0; i < n; i++)
        y[i] = sum_256(sums[i]);
    return 1;
}

FOR_AVX2 INLINE int avx2_expand(const struct task *t, int64_t row, void *out, int kind) {
    int size = kind == FP32 ? 4 : kind >= INT8 ? 1 : 2;
    uint8_t copy[4 * (CHUNK + 8)], chunk[4 * CHUNK];
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        uint64_t before = counts_before(m);
        const uint8_t *values =
            kind == INT4 ? avx2_four_bits(t, at, used, copy) : readable(t, at, used, size, copy);
        int64_t columns = smaller(CHUNK, t->width - CHUNK * j);
        uint8_t *to = columns == CHUNK ? (uint8_t *)out + size * CHUNK * j : chunk;
        UNROLL
        for (int k = 0; k < 8; k++)
            if (kind == FP32)
                _mm256_storeu_si256((__m256i *)(to + 32 * k), avx2_four(m, before, k, values));
            else if (kind >= INT8)
                _mm_storel_epi64((__m128i *)(to + 8 * k), avx2_one(m, before, k, values));
            else
                _mm_storeu_si128((__m128i *)(to + 16 * k), avx2_two(m, before, k, values));
        if (to == chunk)
            memcpy((uint8_t *)out + size * CHUNK * j, chunk, size * columns);
        at += used;
    }
    return 1;
}

#define AVX2_KIND(KIND, DOT)                                                                                           \
    FOR_AVX2 INLINE int avx2_##KIND(const struct task *t, int64_t row, float *y, int n) {                              \
        return DOT(t, row, y, n, KIND);                                                                                \
    }                                                                                                                  \
    INSTANCES(avx2_##KIND, FOR_AVX2)                                                                                   \
    FOR_AVX2 static int avx2_expand_##KIND(const struct task *t, int64_t row, void *out) {                             \
        return avx2_expand(t, row, out, KIND);                                                                         \
    }
AVX2_KIND(BF16, avx2_float_dot)
AVX2_KIND(FP16, avx2_float_dot)
AVX2_KIND(FP32, avx2_float_dot)
AVX2_KIND(INT8, avx2_code_dot)
AVX2_KIND(INT4, avx2_code_dot)

/* --- AVX-512 with VBMI2 ------------------------------------------------------------------------------------------ */

#define FOR_AVX512                                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,f16c,fma,popcnt,bmi,bmi2")))
#define FOR_AVX512_BF16                                                                                                \
    __attribute__((target(                                                                                             \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,f16c,fma,popcnt,bmi,bmi2")))

/* One instruction loads as many values as the mask has bits, and puts them where the bits are. */
FOR_AVX512 INLINE __m512i avx512_two(uint32_t m, const uint16_t *values) {
    return _mm512_maskz_expandloadu_epi16(m, values);
}

/* The codes of a chunk in their columns, as bytes without sign: a code of 8 bits plus 128, twice a code of 4 bits.
   Where nothing is kept stands what is zero then, 128 or 15. */
FOR_AVX512 INLINE __m512i avx512_codes(const struct task *t, uint64_t m, int used, int64_t at, int kind) {
    const uint8_t *values = (const uint8_t *)t->values;
    if (kind == INT8) {
        FETCH_AHEAD(values, at);
        return _mm512_xor_si512(_mm512_maskz_expandloadu_epi8(m, values + at), _mm512_set1_epi8(-128));
    }
    /* Bytes 4 k to 4 k + 7 go into quadword k. Of each, 8 fields that begin a bit before a code are shifted to a byte
       of their own; only the code, times two, is left of it. Which half of a byte comes first depends on `at`. */
    const __m512i spread = _mm512_set_epi8(
        35, 34, 33, 32, 31, 30, 29, 28, 31, 30, 29, 28, 27, 26, 25, 24, 27, 26, 25, 24, 23, 22, 21, 20, 23, 22, 21,
        20, 19, 18, 17, 16, 19, 18, 17, 16, 15, 14, 13, 12, 15, 14, 13, 12, 11, 10, 9, 8, 11, 10, 9, 8, 7, 6, 5, 4,
        7, 6, 5, 4, 3, 2, 1, 0);
    static const uint64_t shifts[2] = {0x1b17130f0b07033f, 0x1f1b17130f0b0703};
    __m512i pairs;
    if (t->count - at >= 2 * CHUNK + 2)
        pairs = _mm512_loadu_si512(values + at / 2);
    else
        pairs = _mm512_maskz_loadu_epi8(((uint64_t)1 << (used + (at & 1) + 1) / 2) - 1, values + at / 2);
    FETCH_AHEAD(values, at / 2);
    __m512i fields = _mm512_multishift_epi64_epi8(
        _mm512_set1_epi64(shifts[at & 1]), _mm512_permutexvar_epi8(spread, pairs));
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(15), m, _mm512_and_si512(fields, _mm512_set1_epi8(30)));
}

FOR_AVX512 INLINE int avx512_float_dot(const struct task *t, int64_t row, float *y, int n, int kind) {
    __m512 sums[MOST_VECTORS], others[MOST_VECTORS];
    UNROLL
    for (int i = 0; i < n; i++)
        sums[i] = others[i] = _mm512_setzero_ps();
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        const float *x = (const float *)t->x + CHUNK * j;
        FETCH_AHEAD(t->values, at * (kind == FP32 ? 4 : 2));
        if (kind == FP32)
            FETCH_AHEAD(t->values, at * 4 + 64);
        UNROLL
        for (int k = 0; k < 2; k++) {
            uint32_t part = (uint32_t)(m >> 32 * k);
            __m512 w, v;
            if (kind == FP32) {
                const float *values = (const float *)t->values + at;
                w = _mm512_maskz_expandloadu_ps(part & 0xffff, values);
                v = _mm512_maskz_expandloadu_ps(part >> 16, values + __builtin_popcount(part & 0xffff));
            } else {
                __m512i both = avx512_two(part, (const uint16_t *)t->values + at);
                if (kind == FP16) {
                    w = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
                    v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
                } else { /* the even columns are the low halves of 32 bits, the odd ones the high halves */
                    w = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                    v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
                }
            }
            at += __builtin_popcount(part);
            UNROLL
            for (int i = 0; i < n; i++) {
                const float *xi = x + i * t->x_stride + 32 * k;
                sums[i] = _mm512_fmadd_ps(w, _mm512_loadu_ps(xi), sums[i]);
                others[i] = _mm512_fmadd_ps(v, _mm512_loadu_ps(xi + 16), others[i]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < n; i++)
        y[i] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i], others[i]));
    return 1;
}

FOR_AVX512_BF16 INLINE int avx512_bf16_dot(const struct task *t, int64_t row, float *y, int n) {
    __m512 sums[MOST_VECTORS], others[MOST_VECTORS];
    UNROLL
    for (int i = 0; i < n; i++)
        sums[i] = others[i] = _mm512_setzero_ps();
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        const uint16_t *x = (const uint16_t *)t->x + CHUNK * j, *values = (const uint16_t *)t->values + at;
        FETCH_AHEAD(values, 0);
        __m512i w = avx512_two((uint32_t)m, values);
        __m512i v = avx512_two((uint32_t)(m >> 32), values + __builtin_popcount((uint32_t)m));
        at += used;
        UNROLL
        for (int i = 0; i < n; i++) {
            const uint16_t *xi = x + i * t->x_stride;
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)w, (__m512bh)_mm512_loadu_si512(xi));
            others[i] = _mm512_dpbf16_ps(others[i], (__m512bh)v, (__m512bh)_mm512_loadu_si512(xi + 32));
        }
    }
    UNROLL
    for (int i = 0; i < n; i++)
        y[i] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i], others[i]));
    return 1;
}

/* Sums of unsigned codes times signed bytes. With code = byte - zero, the sum of code * x is that of byte * x less zero
   times the sum of x in the group, which has been counted once for all rows. */
FOR_AVX512 INLINE int avx512_code_dot(const struct task *t, int64_t row, float *y, int n, int kind) {
    __m512 sums[MOST_VECTORS], corrections[MOST_VECTORS];
    __m512i high[MOST_VECTORS], low[MOST_VECTORS];
    float scales[MOST_VECTORS][16];
    UNROLL
    for (int i = 0; i < n; i++) {
        sums[i] = corrections[i] = _mm512_setzero_ps();
        high[i] = low[i] = _mm512_setzero_si512();
    }
    int64_t per_group = t->group / CHUNK, left = per_group, g = 0, base = -16;
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        if (g == base + 16) { /* the scales of the next 16 groups */
            __mmask16 there = (__mmask16)((1u << smaller(16, t->groups - g)) - 1);
            __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, t->scale + row * t->groups + g));
            UNROLL
            for (int i = 0; i < n; i++) {
                const float *x_scale = t->x_scale + i * t->groups + g, *x_sum = t->x_sum + i * t->groups + g;
                _mm512_storeu_ps(scales[i], _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(there, x_scale)));
                corrections[i] = _mm512_fmadd_ps(scale, _mm512_maskz_loadu_ps(there, x_sum), corrections[i]);
            }
            base = g;
        }
        __m512i codes = avx512_codes(t, m, used, at, kind);
        const int8_t *x = (const int8_t *)t->x + 2 * CHUNK * j;
        at += used;
        UNROLL
        for (int i = 0; i < n; i++) {
            const int8_t *xi = x + i * t->x_stride;
            high[i] = _mm512_dpbusd_epi32(high[i], codes, _mm512_loadu_si512(xi));
            low[i] = _mm512_dpbusd_epi32(low[i], codes, _mm512_loadu_si512(xi + CHUNK));
        }
        if (--left == 0 || j + 1 == t->chunks) {
            UNROLL
            for (int i = 0; i < n; i++) {
                __m512 part = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]));
                sums[i] = _mm512_fmadd_ps(part, _mm512_set1_ps(scales[i][g - base]), sums[i]);
                high[i] = low[i] = _mm512_setzero_si512();
            }
            left = per_group;
            g++;
        }
    }
    UNROLL
    for (int i = 0; i < n; i++)
        y[i] = _mm512_reduce_add_ps(sums[i]) - (kind == INT8 ? 128 : 15) * _mm512_reduce_add_ps(corrections[i]);
    return 1;
}

FOR_AVX512 INLINE int avx512_expand(const struct task *t, int64_t row, void *out, int kind) {
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        int64_t columns = smaller(CHUNK, t->width - CHUNK * j);
        uint64_t within = columns == CHUNK ? ~(uint64_t)0 : ((uint64_t)1 << columns) - 1;
        if (kind >= INT8) {
            __m512i zero = _mm512_set1_epi8(kind == INT8 ? -128 : 15);
            __m512i codes = _mm512_sub_epi8(avx512_codes(t, m, used, at, kind), zero);
            _mm512_mask_storeu_epi8((int8_t *)out + CHUNK * j, within, codes);
        } else if (kind == FP32)
            UNROLL
            for (int k = 0, next = 0; k < 4; k++) {
                uint16_t part = (uint16_t)(m >> 16 * k);
                __m512i w = _mm512_maskz_expandloadu_epi32(part, (const uint32_t *)t->values + at + next);
                _mm512_mask_storeu_epi32(
                    (uint32_t *)out + CHUNK * j + 16 * k, (uint16_t)(within >> 16 * k), w);
                next += __builtin_popcount(part);
            }
        else
            UNROLL
            for (int k = 0, next = 0; k < 2; k++) {
                uint32_t part = (uint32_t)(m >> 32 * k);
                __m512i w = avx512_two(part, (const uint16_t *)t->values + at + next);
                _mm512_mask_storeu_epi16(
                    (uint16_t *)out + CHUNK * j + 32 * k, (uint32_t)(within >> 32 * k), w);
                next += __builtin_popcount(part);
            }
        at += used;
    }
    return 1;
}

#define AVX512_KIND(KIND, DOT)                                                                                         \
    FOR_AVX512 INLINE int avx512_##KIND(const struct task *t, int64_t row, float *y, int n) {                          \
        return DOT(t, row, y, n, KIND);                                                                                \
    }                                                                                                                  \
    INSTANCES(avx512_##KIND, FOR_AVX512)                                                                               \
    FOR_AVX512 static int avx512_expand_##KIND(const struct task *t, int64_t row, void *out) {                         \
        return avx512_expand(t, row, out, KIND);                                                                       \
    }
AVX512_KIND(BF16, avx512_float_dot)
AVX512_KIND(FP16, avx512_float_dot)
AVX512_KIND(FP32, avx512_float_dot)
AVX512_KIND(INT8, avx512_code_dot)
AVX512_KIND(INT4, avx512_code_dot)
INSTANCES(avx512_bf16_dot, FOR_AVX512_BF16)

#endif

/* --- NEON -------------------------------------------------------------------------------------------------------- */

#ifdef ARM

INLINE uint8x16_t neon_two(uint64_t m, uint64_t before, int k, const uint8_t *values) {
    return vqtbl1q_u8(vld1q_u8(values + 2 * (before >> 8 * k & 255)), vld1q_u8(places_of_two[m >> 8 * k & 255]));
}

INLINE int8x8_t neon_one(uint64_t m, uint64_t before, int k, const uint8_t *values) {
    return vreinterpret_s8_u8(vtbl1_u8(vld1_u8(values + (before >> 8 * k & 255)), vld1_u8(places[m >> 8 * k & 255])));
}

INLINE int neon_float_dot(const struct task *t, int64_t row, float *y, int n, int kind) {
    float32x4_t sums[MOST_VECTORS], others[MOST_VECTORS];
    uint8_t copy[2 * (CHUNK + 8)];
    UNROLL
    for (int i = 0; i < n; i++)
        sums[i] = others[i] = vdupq_n_f32(0);
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        uint64_t before = counts_before(m);
        const uint8_t *values = readable(t, at, used, 2, copy);
        const float *x = (const float *)t->x + CHUNK * j;
        FETCH_AHEAD(values, 0);
        UNROLL
        for (int k = 0; k < 8; k++) {
            uint16x8_t both = vreinterpretq_u16_u8(neon_two(m, before, k, values));
            float32x4_t w, v;
            if (kind == FP16) {
                w = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(both)));
                v = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(both)));
            } else {
                w = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(both), 16));
                v = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(both), 16));
            }
            UNROLL
            for (int i = 0; i < n; i++) {
                const float *xi = x + i * t->x_stride + 8 * k;
                sums[i] = vfmaq_f32(sums[i], w, vld1q_f32(xi));
                others[i] = vfmaq_f32(others[i], v, vld1q_f32(xi + 4));
            }
        }
        at += used;
    }
    UNROLL
    for (int i = 0; i < n; i++)
        y[i] = vaddvq_f32(vaddq_f32(sums[i], others[i]));
    return 1;
}

INLINE int neon_code_dot(const struct task *t, int64_t row, float *y, int n, int kind) {
    float32x4_t sums[MOST_VECTORS];
    int32x4_t parts[MOST_VECTORS];
    uint8_t copy[CHUNK + 8];
    int64_t per_group = t->group / CHUNK;
    UNROLL
    for (int i = 0; i < n; i++) {
        sums[i] = vdupq_n_f32(0);
        parts[i] = vdupq_n_s32(0);
    }
    FOR_EACH_CHUNK(t, row) {
        NEXT_BITS(t)
        uint64_t before = counts_before(m);
        const uint8_t *values = kind == INT8 ? readable(t, at, used, 1, copy) : four_bits(t, at, used, copy);
        const int16_t *x = (const int16_t *)t->x + CHUNK * j;
        UNROLL
        for (int k = 0; k < 8; k++) {
            int16x8_t w = vmovl_s8(neon_one(m, before, k, values));
            UNROLL
            for (int i = 0; i < n; i++) {
                int16x8_t xi = vld1q_s16(x + i * t->x_stride + 8 * k);
                parts[i] = vmlal_s16(parts[i], vget_low_s16(w), vget_low_s16(xi));
                parts[i] = vmlal_high_s16(parts[i], w, xi);
            }
        }
        at += used;
        if ((j + 1) % per_group == 0 || j + 1 == t->chunks) {
            int64_t g = j / per_group;
            float scale = half_to_float(t->scale[row * t->groups + g]);
            UNROLL
            for (int i = 0; i < n; i++) {
                sums[i] = vfmaq_n_f32(sums[i], vcvtq_f32_s32(parts[i]), scale * t->x_scale[i * t->groups + g]);
                parts[i] = vdupq_n_s32(0);
            }
        }
    }
    UNROLL
    for (int i = 0; i < n; i++)
        y[i] = vaddvq_f32(sums[i]);
    return 1;
}

#define NEON_KIND(KIND, DOT)                                                                                           \
    INLINE int neon_##KIND(const struct task *t, int64_t row, float *y, int n) { return DOT(t, row, y, n, KIND); }     \
    INSTANCES(neon_##KIND, )
NEON_KIND(BF16, neon_float_dot)
NEON_KIND(FP16, neon_float_dot)
NEON_KIND(INT8, neon_code_dot)
NEON_KIND(INT4, neon_code_dot)

#endif

/* --- The paths ---------------------------------------------------------------------------------------------------- */

#define PLAIN_DOTS {ALL(plain_BF16), ALL(plain_FP16), ALL(plain_FP32), ALL(plain_INT8), ALL(plain_INT4)}
#define EXPANDS(P) {P##_expand_BF16, P##_expand_FP16, P##_expand_FP32, P##_expand_INT8, P##_expand_INT4}

static const dot_function dots[PATHS][KINDS][4] = {
    [PLAIN] = PLAIN_DOTS,
#ifdef ARM
    [NEON] = {ALL(neon_BF16), ALL(neon_FP16), ALL(plain_FP32), ALL(neon_INT8), ALL(neon_INT4)},
#endif
#ifdef X86
    [AVX2] = {ALL(avx2_BF16), ALL(avx2_FP16), ALL(avx2_FP32), ALL(avx2_INT8), ALL(avx2_INT4)},
    [AVX512] = {ALL(avx512_BF16), ALL(avx512_FP16), ALL(avx512_FP32), ALL(avx512_INT8), ALL(avx512_INT4)},
    [AVX512_BF16] =
        {ALL(avx512_bf16_dot), ALL(avx512_FP16), ALL(avx512_FP32), ALL(avx512_INT8), ALL(avx512_INT4)},
#endif
};

static const expand_function expands[PATHS][KINDS] = {
    [PLAIN] = EXPANDS(plain),
#ifdef ARM
    [NEON] = EXPANDS(plain),
#endif
#ifdef X86
    [AVX2] = EXPANDS(avx2),
    [AVX512] = EXPANDS(avx512),
    [AVX512_BF16] = EXPANDS(avx512),
#endif
};

/* Whether this machine can take a path. */
int rarefy_can(int path) {
    if (path == PLAIN)
        return 1;
#ifdef ARM
    if (path == NEON)
        return 1;
#endif
#ifdef X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("popcnt");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                 __builtin_cpu_supports("avx512vnni");
    if (path == AVX2)
        return avx2;
    if (path == AVX512)
        return avx512;
    if (path == AVX512_BF16)
        return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return 0;
}

/* --- The vectors --------------------------------------------------------------------------------------------------- */

static enum form form_of(int path, int kind) {
    if (kind >= INT8)
        return path >= AVX512 ? X_BYTES : X_INT;
    if (kind == BF16 && path == AVX512_BF16)
        return X_BF16;
    return kind == BF16 && path == AVX512 ? X_EVEN_ODD : X_FLOAT;
}

/* Memory that each thread keeps for the vectors of its calls. */
static void *workspace(size_t size) {
    static __thread void *kept;
    static __thread size_t kept_size;
    if (size > kept_size) {
        free(kept);
        kept_size = 0;
        if (posix_memalign(&kept, 64, size))
            kept = NULL;
        else
            kept_size = size;
    }
    return kept;
}

INLINE float x_at(const void *x, int bfloat, int64_t i) {
    return bfloat ? bfloat_to_float(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

/* The largest 16-bit integer of which both bytes have a sign of their own: 127 * 256 + 127. */
#define LARGEST 32639

/* One vector rounded to 16 bits, each group by its own scale, and the sum of each group; NaN where a group holds what
   is not finite. As bytes, 64 high ones come before the 64 low ones of a chunk. */
INLINE void round_vector(
    const void *x, int bfloat, int64_t width, int64_t group, int bytes, void *to, float *scales, float *group_sums) {
    int16_t *integers = to;
    int8_t *planes = to;
    for (int64_t start = 0; start < width; start += group, scales++, group_sums++) {
        int64_t end = smaller(width, start + group);
        int32_t largest_word = 0; /* of positive floats, and NaN, the order is that of their words */
        for (int64_t c = start; c < end; c++) {
            float value = x_at(x, bfloat, c);
            int32_t word;
            memcpy(&word, &value, 4);
            word &= 0x7fffffff;
            largest_word = word > largest_word ? word : largest_word;
        }
        float largest;
        memcpy(&largest, &largest_word, 4);
        int finite = largest < INFINITY, usable = finite && largest > 1e-30f; /* else its inverse is none */
        *scales = usable ? largest / LARGEST : finite ? 0 : NAN;
        float factor = usable ? LARGEST / largest : 0;
        int32_t sum = 0;
        for (int64_t c = start; c < end; c++) {
            float scaled = x_at(x, bfloat, c) * factor;
            int32_t integer = usable ? (int32_t)(scaled + copysignf(0.5f, scaled)) : 0;
            sum += integer;
            if (bytes) {
                int32_t low = (int8_t)integer;
                planes[2 * (c & ~63) + (c & 63)] = (int8_t)((integer - low) >> 8);
                planes[2 * (c & ~63) + 64 + (c & 63)] = (int8_t)low;
            } else
                integers[c] = (int16_t)integer;
        }
        *group_sums = *scales * (float)sum;
    }
}

/* The vectors in the form of the path, in this thread's memory, zeros up to a whole number of chunks and for those
   that are missing to `padded`; false where there is no memory. */
INLINE int prepare(struct task *t, enum form form, const void *x, int bfloat, int vectors, int padded) {
    int64_t stride = CHUNK * t->chunks, size = form == X_FLOAT || form == X_EVEN_ODD ? 4 : 2;
    int64_t total = padded * (stride * size + 2 * t->groups * (int64_t)sizeof(float));
    char *memory = workspace(total + 64);
    if (!memory)
        return 0;
    float *scales = (float *)(memory + padded * stride * size), *sums = scales + padded * t->groups;
    memset(memory, 0, total);
    for (int i = 0; i < vectors; i++) {
        const void *from = (const char *)x + i * t->width * (bfloat ? 2 : 4);
        char *to = memory + i * stride * size;
        if (form == X_INT || form == X_BYTES)
            round_vector(
                from, bfloat, t->width, t->group, form == X_BYTES, to, scales + i * t->groups, sums + i * t->groups);
        else if (form == X_BF16 && bfloat)
            memcpy(to, from, 2 * t->width);
        else
            for (int64_t c = 0; c < t->width; c++) {
                float value = x_at(from, bfloat, c);
                if (form == X_BF16)
                    ((uint16_t *)to)[c] = float_to_bfloat(value);
                else if (form == X_FLOAT)
                    ((float *)to)[c] = value;
                else
                    ((float *)to)[(c & ~31) + (c & 1) * 16 + (c & 31) / 2] = value;
            }
    }
    t->x = memory;
    t->x_stride = form == X_BYTES ? 2 * stride : stride;
    t->x_scale = scales;
    t->x_sum = sums;
    return 1;
}

/* A row of codes times their scales. */
INLINE void decode(const struct task *t, int64_t row, const int8_t *codes, void *to, int bfloat) {
    for (int64_t g = 0; g < t->groups; g++) {
        float factor = half_to_float(t->scale[row * t->groups + g]);
        int64_t end = smaller(t->width, (g + 1) * t->group);
        if (bfloat)
            for (int64_t c = g * t->group; c < end; c++)
                ((uint16_t *)to)[c] = float_to_bfloat((float)codes[c] * factor);
        else
            for (int64_t c = g * t->group; c < end; c++)
                ((float *)to)[c] = (float)codes[c] * factor;
    }
}

static void decode_plainly(const struct task *t, int64_t row, const int8_t *codes, void *to, int bfloat) {
    decode(t, row, codes, to, bfloat);
}

static int prepare_plainly(struct task *t, enum form form, const void *x, int bfloat, int vectors, int padded) {
    return prepare(t, form, x, bfloat, vectors, padded);
}

#ifdef X86
/* The same loops, for wider vector units. */
FOR_AVX2 static int prepare_avx2(struct task *t, enum form form, const void *x, int bfloat, int vectors, int padded) {
    return prepare(t, form, x, bfloat, vectors, padded);
}

FOR_AVX2 static void decode_avx2(const struct task *t, int64_t row, const int8_t *codes, void *to, int bfloat) {
    decode(t, row, codes, to, bfloat);
}
#else
#define prepare_avx2 prepare_plainly
#define decode_avx2 decode_plainly
#endif

/* --- What is called ------------------------------------------------------------------------------------------------- */

/* False unless the numbers describe a matrix; all that is read later lies within what they say. */
static int describe(struct task *t, int kind, int path, int64_t group) {
    if (kind < 0 || kind >= KINDS || path < 0 || path >= PATHS || !dots[path][kind][0] || t->rows < 0 ||
        t->width < 1 || t->count < 0)
        return 0;
    t->stride = (t->width + 31) / 32 * 4;
    t->chunks = (t->stride + 7) / 8;
    t->group = group;
    t->groups = 0;
    if (kind >= INT8) {
        if (group < CHUNK || group % CHUNK || group > 4096 || !t->scale)
            return 0;
        t->groups = (t->width + group - 1) / group;
    }
    return 1;
}

/* y (vectors, rows) = x (vectors, width) times the matrix transposed, plus bias (rows).

   x, y and bias are bfloat16 if `bfloat`, else float32; vectors at most 8. `values` has `count` values (codes of 4
   bits: count / 2 bytes), `mask` rows * ceil(width / 32) * 4 bytes, `offsets` rows + 1 numbers, `scale` rows *
   ceil(width / group) of float16. Returns 0, 1 for impossible arguments, 2 where a mask holds other than the values
   that its offsets say, 3 for want of memory. */
int rarefy_product(
    int path, int kind, const void *values, int64_t count, const uint8_t *mask, const int64_t *offsets,
    const uint16_t *scale, int64_t group, int64_t rows, int64_t width, const void *x, int bfloat, int vectors,
    const void *bias, void *y, int threads) {
    struct task t = {values, mask, offsets, scale, .count = count, .rows = rows, .width = width};
    if (!describe(&t, kind, path, group) || vectors < 1 || vectors > MOST_VECTORS)
        return 1;
    if (path == AVX512_BF16 && !bfloat)
        path = AVX512; /* vectors of float32 are not rounded */
    int instance = vectors > 4 ? 3 : vectors > 2 ? 2 : vectors - 1;
    if (!(path >= AVX2 ? prepare_avx2 : prepare_plainly)(&t, form_of(path, kind), x, bfloat, vectors, 1 << instance))
        return 3;
    dot_function dot = dots[path][kind][instance];
    int wrong = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : wrong) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float sums[MOST_VECTORS];
        if (!dot(&t, row, sums)) {
            wrong = 1;
            continue;
        }
        for (int i = 0; i < vectors; i++) {
            float sum = sums[i] + (bias ? x_at(bias, bfloat, row) : 0);
            if (bfloat)
                ((uint16_t *)y)[i * rows + row] = float_to_bfloat(sum);
            else
                ((float *)y)[i * rows + row] = sum;
        }
    }
    return wrong ? 2 : 0;
}

/* out (rows, width) = the matrix: values of 2 or 4 bytes as they are, codes in bfloat16 if `bfloat`, else in float32.

   Other arguments and what is returned are those of rarefy_product. */
int rarefy_unpack(
    int path, int kind, const void *values, int64_t count, const uint8_t *mask, const int64_t *offsets,
    const uint16_t *scale, int64_t group, int64_t rows, int64_t width, void *out, int bfloat, int threads) {
    struct task t = {values, mask, offsets, scale, .count = count, .rows = rows, .width = width};
    if (!describe(&t, kind, path, group))
        return 1;
    expand_function expand = expands[path][kind];
    int size = kind >= INT8 ? (bfloat ? 2 : 4) : kind == FP32 ? 4 : 2, wrong = 0;
#pragma omp parallel num_threads(threads) reduction(| : wrong) if (threads > 1)
    {
        int8_t *codes = kind >= INT8 ? malloc(width) : NULL;
        if (kind >= INT8 && !codes)
            wrong |= 2;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            char *to = (char *)out + row * width * size;
            if (wrong & 2)
                continue;
            if (!expand(&t, row, kind >= INT8 ? (void *)codes : to))
                wrong |= 1;
            else if (kind >= INT8)
                (path >= AVX2 ? decode_avx2 : decode_plainly)(&t, row, codes, to, bfloat);
        }
        free(codes);
    }
    return wrong & 2 ? 3 : wrong ? 2 : 0;
}

/* The columns' bits of each row counted into `offsets` (rows + 1), each row's count rounded up to whole `unit`s.

   Returns 0, or 1 where a bit beyond the width is set. */
int rarefy_count(const uint8_t *mask, int64_t rows, int64_t width, int64_t unit, int64_t *offsets) {
    int64_t stride = (width + 31) / 32 * 4, chunks = (stride + 7) / 8, wrong = 0;
    uint64_t beyond = width % CHUNK ? ~(uint64_t)0 << width % CHUNK : 0;
    offsets[0] = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t count = 0;
        for (int64_t j = 0; j < chunks; j++)
            count += __builtin_popcountll(bits(mask + row * stride, j, stride));
        wrong |= (bits(mask + row * stride, chunks - 1, stride) & beyond) != 0;
        offsets[row + 1] = offsets[row] + (count + unit - 1) / unit * unit;
    }
    return wrong;
}
