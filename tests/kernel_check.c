/* Compares every path of the kernel that this machine can take with plain C, on random packed matrices.

   For machines that the other tests do not run on: test_packed_kernel.py builds it for ARM and runs it emulated. */

#include "../src/rarefy/packing/kernel.c"
#include <stdio.h>

static uint64_t state = 1;

static uint32_t drawn(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static float number(void) { return (float)drawn() / (float)(1u << 30) - 1; }

static int check(int path, int kind, int64_t rows, int64_t width, int sparsity, int vectors, int bfloat) {
    int64_t stride = (width + 31) / 32 * 4, group = 64, groups = (width + group - 1) / group, most = rows * (width + 1);
    uint8_t *mask = calloc(rows, stride), *values = malloc(4 * most);
    int64_t *offsets = malloc(8 * (rows + 1));
    uint16_t *scale = malloc(2 * rows * groups);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < width; c++)
            if (drawn() % 100 >= (uint32_t)sparsity)
                mask[row * stride + c / 8] |= 1 << c % 8;
    rarefy_count(mask, rows, width, kind == INT4 ? 2 : 1, offsets);
    int64_t count = offsets[rows];
    for (int64_t i = 0; i < count; i++) {
        float value = number();
        if (kind == FP32)
            ((float *)values)[i] = value;
        else if (kind >= INT8)
            values[i] = drawn();
        else
            ((uint16_t *)values)[i] = kind == BF16 ? float_to_bfloat(value) : 0x3000 + drawn() % 0x800;
    }
    for (int64_t i = 0; i < rows * groups; i++)
        scale[i] = 0x2000 + drawn() % 0x400;
    void *x = malloc(4 * vectors * width);
    for (int64_t i = 0; i < vectors * width; i++)
        if (bfloat)
            ((uint16_t *)x)[i] = float_to_bfloat(number());
        else
            ((float *)x)[i] = number();
    /* The exact last bytes of the arrays, so that an emulator or a checker of memory sees what is read beyond. */
    size_t size = kind == INT4 ? count / 2 : kind == INT8 ? count : kind == FP32 ? 4 * count : 2 * count;
    uint8_t *exact = malloc(size ? size : 1);
    memcpy(exact, values, size);
    float *ours = malloc(4 * vectors * rows), *plain = malloc(4 * vectors * rows);
    uint32_t *dense = malloc(4 * rows * width), *expected = malloc(4 * rows * width);
    int failed = 0;
    failed |= rarefy_product(
        path, kind, exact, count, mask, offsets, scale, group, rows, width, x, bfloat, vectors, NULL, ours, 1);
    failed |= rarefy_product(
        PLAIN, kind, exact, count, mask, offsets, scale, group, rows, width, x, bfloat, vectors, NULL, plain, 1);
    failed |= rarefy_unpack(path, kind, exact, count, mask, offsets, scale, group, rows, width, dense, 0, 1);
    failed |= rarefy_unpack(PLAIN, kind, exact, count, mask, offsets, scale, group, rows, width, expected, 0, 1);
    for (int64_t i = 0; i < vectors * rows && !failed; i++) {
        float a = bfloat ? bfloat_to_float(((uint16_t *)ours)[i]) : ours[i];
        float b = bfloat ? bfloat_to_float(((uint16_t *)plain)[i]) : plain[i];
        failed |= !(fabsf(a - b) <= (bfloat ? 1e-2f : 1e-5f) * (float)(width + fabsf(b)));
    }
    failed |= memcmp(dense, expected, (kind == FP32 || kind >= INT8 ? 4 : 2) * rows * width) != 0;
    void *all[] = {mask, values, offsets, scale, x, exact, ours, plain, dense, expected};
    for (int i = 0; i < 10; i++)
        free(all[i]);
    return failed;
}

int main(void) {
    const int64_t widths[] = {1, 31, 32, 33, 64, 65, 100, 300, 576};
    int checked = 0, failed = 0;
    for (int path = 0; path < PATHS; path++)
        if (rarefy_can(path))
            for (int kind = 0; kind < KINDS; kind++)
                for (int w = 0; w < 9; w++)
                    for (int sparsity = 0; sparsity <= 100; sparsity += 50)
                        for (int vectors = 1; vectors <= 8; vectors++, checked++)
                            failed += check(path, kind, 5, widths[w], sparsity, vectors, vectors % 2);
    printf("%d checked, %d failed\n", checked, failed);
    return failed != 0;
}
