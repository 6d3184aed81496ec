/* What the null card says of itself; the environment chooses. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dlfcn.h>
#include <sys/mman.h>

/* Compute capability times 10. */
static int capability(void) { return atoi(getenv("NULL_CARD_CAPABILITY")); }
static size_t memory(void) { return 80ul << 30; }
static const char *card_name(void) { return "Null card"; }
/* Shared memory of a block, as CUDA's programming guide has it. */
static int shared_memory(void) {
  int has = capability();
  return (has == 80 ? 163 : has == 90 || has == 100 ? 227 : 99) << 10;
}
/* Attributes have the same numbers in the runtime and the driver. */
static int attribute(int which) {
  switch (which) {
    case 1: return 1024;                    /* threads per block */
    case 8: return 48 << 10;                /* shared memory per block */
    case 10: return 32;                     /* warp */
    case 13: return 1980000;                /* kHz */
    case 16: return 132;                    /* multiprocessors */
    case 36: return 2600000;                /* kHz of the memory */
    case 37: return 5120;                   /* bits of its bus */
    case 39: return 2048;                   /* threads per multiprocessor */
    case 75: return capability() / 10;
    case 76: return capability() % 10;
    case 81: return shared_memory() + 1024; /* per multiprocessor */
    case 82: return 65536;                  /* registers */
    case 97: return shared_memory();        /* opt-in, per block */
    default: return 1;
  }
}
static void *reserve(size_t bytes) {
  return mmap(0, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
/* Addresses of handles; nobody reads what is there. */
static char handle[4096];
