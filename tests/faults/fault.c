/* SPDX-License-Identifier: Apache-2.0 */
/* Stops a process, or lets it fail, at one of the system calls that write below a folder.
 *
 * A filter of seccomp traps those calls, whoever makes them: Python, Rust, GDAL, libc's own buffers. The handler makes
 * the call itself from one place that the filter lets through. Armed in a child process, because a filter stays.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/ucontext.h>
#include <unistd.h>

static char folder[4096], listing[4096];
static int at, kind, first_only;
static volatile int count;

/* the only system call instruction that the filter knows */
extern const char allowed_end[];
long allowed(long number, long a, long b, long c, long d, long e, long f);
__asm__(
    ".text\n.globl allowed\n.type allowed,@function\nallowed:\n"
    "mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\nmov %r9,%r8\nmov 8(%rsp),%r9\n"
    "syscall\n.globl allowed_end\nallowed_end:\nret\n");

static const int by_descriptor[] = {SYS_write, SYS_pwrite64, SYS_writev, SYS_fsync, SYS_fdatasync, SYS_ftruncate};
static const int by_path[] = {SYS_open, SYS_creat, SYS_rename, SYS_unlink, SYS_mkdir, SYS_rmdir};
static const int by_folder_and_path[] = {SYS_openat, SYS_renameat, SYS_renameat2, SYS_unlinkat, SYS_mkdirat};
static const int by_target[] = {SYS_copy_file_range, SYS_sendfile};

#define HAS(list, number) has(list, sizeof(list) / sizeof(*list), number)
static int has(const int* list, unsigned long length, int number) {
  for (unsigned long i = 0; i < length; ++i)
    if (list[i] == number) return 1;
  return 0;
}

/* The path that a call writes to, empty if it only reads. */
static void path_of(int number, const greg_t* r, char* path, size_t size) {
  char link[64];
  long descriptor = -1, length;
  const char* name = NULL;
  int flags = 0;
  path[0] = 0;
  if (HAS(by_descriptor, number)) descriptor = r[REG_RDI];
  if (number == SYS_copy_file_range) descriptor = r[REG_RDX];
  if (number == SYS_sendfile) descriptor = r[REG_RDI];
  if (HAS(by_path, number)) name = (const char*)r[REG_RDI];
  if (HAS(by_folder_and_path, number)) {
    name = (const char*)r[REG_RSI];
    if (name[0] != '/') descriptor = (int)r[REG_RDI];
  }
  if (number == SYS_open) flags = r[REG_RSI];
  if (number == SYS_openat) flags = r[REG_RDX];
  if ((number == SYS_open || number == SYS_openat) && !(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return;
  if (descriptor >= 0) {
    snprintf(link, sizeof(link), "/proc/self/fd/%ld", descriptor);
    length = allowed(SYS_readlink, (long)link, (long)path, size - 1, 0, 0, 0);
    path[length < 0 ? 0 : length] = 0;
  } else if (name != NULL && name[0] != '/') {
    length = allowed(SYS_getcwd, (long)path, size - 1, 0, 0, 0, 0);
    path[length < 0 ? 0 : length - 1] = 0;
  }
  if (name != NULL) {
    length = strlen(path);
    snprintf(path + length, size - length, "%s%s", length ? "/" : "", name);
  }
}

static void trapped(int signal, siginfo_t* info, void* context) {
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  const int number = info->si_syscall, saved = errno;
  char path[4096], line[4200];
  path_of(number, r, path, sizeof(path));
  (void)signal;
  if (strncmp(path, folder, strlen(folder)) == 0) {
    const int mine = __sync_add_and_fetch(&count, 1);
    if (listing[0]) {
      const long file = allowed(SYS_openat, AT_FDCWD, (long)listing, O_WRONLY | O_CREAT | O_APPEND, 0644, 0, 0);
      const int length = snprintf(line, sizeof(line), "%d %s\n", number, path + strlen(folder));
      allowed(SYS_write, file, (long)line, length, 0, 0, 0);
      allowed(SYS_close, file, 0, 0, 0, 0, 0);
    }
    if (at > 0 && (first_only ? mine == at : mine >= at)) {
      if (kind == 0) allowed(SYS_kill, allowed(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
      /* a full disk can still be cleared up */
      if (number != SYS_unlink && number != SYS_unlinkat && number != SYS_rmdir) {
        r[REG_RAX] = -kind;
        errno = saved;
        return;
      }
    }
  }
  r[REG_RAX] = allowed(number, r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]);
  errno = saved;
}

/* From now on the call number `n` that writes below `below` fails with the error `error`, or with 0 is the last thing
 * that this process does; `once`: only this one, otherwise every later one too. `list` gets a line for each. */
int arm(const char* below, int n, int error, int once, const char* list) {
  struct sigaction action = {0};
  struct sock_filter filter[64];
  const unsigned long end = (unsigned long)allowed_end;
  int length = 0;
  strncpy(folder, below, sizeof(folder) - 1);
  strncpy(listing, list, sizeof(listing) - 1);
  at = n, kind = error, first_only = once;
  action.sa_sigaction = trapped;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
  if (sigaction(SIGSYS, &action, NULL)) return errno;
#define LOAD(field) filter[length++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, field)
#define PASS filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define EQUAL(value, yes, no) filter[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no)
  LOAD(offsetof(struct seccomp_data, instruction_pointer));
  EQUAL((unsigned)end, 0, 3);
  LOAD(offsetof(struct seccomp_data, instruction_pointer) + 4);
  EQUAL((unsigned)(end >> 32), 0, 1);
  PASS;
  LOAD(offsetof(struct seccomp_data, nr));
#define TRAP(list)                                              \
  for (unsigned long i = 0; i < sizeof(list) / sizeof(*list); ++i) { \
    EQUAL((unsigned)list[i], 0, 1);                             \
    filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP); \
  }
  TRAP(by_descriptor)
  TRAP(by_path)
  TRAP(by_folder_and_path)
  TRAP(by_target)
  PASS;
  struct sock_fprog program = {length, filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program)) return errno;
  return 0;
}
