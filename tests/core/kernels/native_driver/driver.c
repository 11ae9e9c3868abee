/* The native library in a process without Python: to run the code of another processor under an emulator, and to count
 * instructions. See remote.py.
 *
 * driver ARENA BYTES maps the file ARENA, writes the mapping's address, then answers calls on standard input: eleven
 * int64, the number of a function and ten arguments, addresses being those of the mapping. The answer is one int64. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { ARGUMENTS = 10 };

/* The real types are module.c's. On x86-64 and AArch64 each argument takes 64 bits of a register or of the stack, so one
 * type serves to hand them on. */
typedef int64_t any(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
any robuq_interface, robuq_supports, robuq_open, robuq_close, robuq_rotate_quantize, robuq_ternary_linear, robuq_ternary,
    robuq_attention, robuq_block, robuq_linear, robuq_planar_from_base3, robuq_weight_counts;

/* In the order of remote.py. */
static any *const functions[] = {
    robuq_interface, robuq_supports, robuq_open, robuq_close, robuq_rotate_quantize, robuq_ternary_linear,
    robuq_ternary, robuq_attention, robuq_block, robuq_linear, robuq_planar_from_base3, robuq_weight_counts,
};

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    void *arena = mmap(NULL, (size_t)atoll(argv[2]), PROT_READ | PROT_WRITE, MAP_SHARED, open(argv[1], O_RDWR), 0);
    if (arena == MAP_FAILED) return 1;
    int64_t answer = (int64_t)(intptr_t)arena, request[1 + ARGUMENTS];
    for (;;) {
        if (fwrite(&answer, sizeof answer, 1, stdout) != 1 || fflush(stdout)) return 1;
        if (fread(request, sizeof request, 1, stdin) != 1) return 0;
        const int64_t *a = request + 1;
        answer = functions[request[0]](a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
    }
}
