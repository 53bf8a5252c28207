/* LD_PRELOAD: system calls on files under $FAULT_ROOT that fail, are interrupted, or do less than asked.
 *
 * FAULTS names the calls, separated by commas, or "all"; nothing happens without it. What a whole file system cannot
 * do ("flock", "fsync of directories", "renameat2", "statvfs") is not part of "all". FAULT_ERROR is the errno, FAULT_PER_MILLE how often it is met, FAULT_SHORT how often (per mille) a count is cut, FAULT_SEED the dice.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned state;

static unsigned dice(unsigned sides)
{
    pthread_mutex_lock(&lock);
    if (!state)
        state = (unsigned)atoi(getenv("FAULT_SEED") ? getenv("FAULT_SEED") : "1") * 2654435761u + 1;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    unsigned n = state % sides;
    pthread_mutex_unlock(&lock);
    return n;
}

static int number(const char *name)
{
    const char *value = getenv(name);
    return value ? atoi(value) : 0;
}

static int is_meant(const char *call, const char *path)
{
    const char *calls = getenv("FAULTS"), *root = getenv("FAULT_ROOT");
    if (!calls || !root || !strstr(path, root))
        return 0;
    if (!strcmp(calls, "all"))
        return 1;
    size_t n = strlen(call);
    for (const char *at = calls; (at = strstr(at, call)); at += n)
        if ((at == calls || at[-1] == ',') && (!at[n] || at[n] == ','))
            return 1;
    return 0;
}

/* By that name alone, not as one of all. */
static int is_named(const char *call, const char *path)
{
    const char *calls = getenv("FAULTS");
    return calls && strcmp(calls, "all") && is_meant(call, path);
}

static int is_meant_fd(const char *call, int fd)
{
    if (!getenv("FAULTS"))
        return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0)
        return 0;
    path[n] = 0;
    return is_meant(call, path);
}

static int is_named_fd(const char *call, int fd)
{
    const char *calls = getenv("FAULTS");
    return calls && strcmp(calls, "all") && is_meant_fd(call, fd);
}

static int is_meant_at(const char *call, int directory, const char *name)
{
    char link[64], path[2 * PATH_MAX];
    if (name[0] == '/' || directory < 0)
        return is_meant(call, name);
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t n = readlink(link, path, PATH_MAX);
    if (n < 0)
        return 0;
    snprintf(path + n, sizeof path - (size_t)n, "/%s", name);
    return is_meant(call, path);
}

static int fails(int meant)
{
    if (!meant || (int)dice(1000) >= number("FAULT_PER_MILLE"))
        return 0;
    errno = number("FAULT_ERROR");
    return 1;
}

static size_t cut(int meant, size_t count)
{
    if (!meant || count < 2 || (int)dice(1000) >= number("FAULT_SHORT"))
        return count;
    return 1 + dice(count > 1u << 20 ? 1u << 20 : (unsigned)count - 1);
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

#define COUNTED(name, call, buffer)                                                        \
    ssize_t name(int fd, buffer data, size_t count, off_t offset)                          \
    {                                                                                      \
        int meant = is_meant_fd(call, fd);                                                 \
        if (fails(meant))                                                                  \
            return -1;                                                                     \
        return REAL(#name, ssize_t (*)(int, buffer, size_t, off_t))(fd, data, cut(meant, count), offset); \
    }
COUNTED(pread, "pread", void *)
COUNTED(pread64, "pread", void *)
COUNTED(pwrite, "pwrite", const void *)
COUNTED(pwrite64, "pwrite", const void *)

#define VECTOR(name)                                                                       \
    ssize_t name(int fd, const struct iovec *parts, int n, off_t offset)                   \
    {                                                                                      \
        int meant = is_meant_fd("preadv", fd);                                             \
        if (fails(meant))                                                                  \
            return -1;                                                                     \
        struct iovec one = parts[0];                                                       \
        if (n == 1)                                                                        \
            one.iov_len = cut(meant, one.iov_len);                                         \
        return REAL(#name, ssize_t (*)(int, const struct iovec *, int, off_t))(fd, n == 1 ? &one : parts, n, offset); \
    }
VECTOR(preadv)
VECTOR(preadv64)

ssize_t write(int fd, const void *data, size_t count)
{
    int meant = is_meant_fd("write", fd);
    if (fails(meant))
        return -1;
    return REAL("write", ssize_t (*)(int, const void *, size_t))(fd, data, cut(meant, count));
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags)
{
    int meant = is_meant_fd("copy_file_range", out) || is_meant_fd("copy_file_range", in);
    if (fails(meant))
        return -1;
    return REAL("copy_file_range", ssize_t (*)(int, off64_t *, int, off64_t *, size_t, unsigned))(
        in, from, out, to, cut(meant, count), flags);
}

#define SEND(name)                                                                         \
    ssize_t name(int out, int in, off_t *offset, size_t count)                             \
    {                                                                                      \
        int meant = is_meant_fd("sendfile", out) || is_meant_fd("sendfile", in);           \
        if (fails(meant))                                                                  \
            return -1;                                                                     \
        return REAL(#name, ssize_t (*)(int, int, off_t *, size_t))(out, in, offset, cut(meant, count)); \
    }
SEND(sendfile)
SEND(sendfile64)

static int is_directory(int fd)
{
    struct stat status;
    return !fstat(fd, &status) && S_ISDIR(status.st_mode);
}

int fsync(int fd)
{
    int meant = is_meant_fd("fsync", fd) || (is_directory(fd) && is_named_fd("fsync of directories", fd));
    return fails(meant) ? -1 : REAL("fsync", int (*)(int))(fd);
}

int flock(int fd, int operation)
{
    return fails(is_named_fd("flock", fd)) ? -1 : REAL("flock", int (*)(int, int))(fd, operation);
}

/* A file system that knows nothing of its size. */
#define SIZES(name, kind)                                                                  \
    int name(const char *path, struct kind *sizes)                                         \
    {                                                                                      \
        int done = REAL(#name, int (*)(const char *, struct kind *))(path, sizes);         \
        if (is_named("statvfs", path))                                                     \
            memset(sizes, 0, sizeof *sizes);                                               \
        return done;                                                                       \
    }
SIZES(statvfs, statvfs)
SIZES(statvfs64, statvfs64)

int rename(const char *old, const char *new)
{
    return fails(is_meant("rename", old)) ? -1 : REAL("rename", int (*)(const char *, const char *))(old, new);
}

int renameat(int a, const char *old, int b, const char *new)
{
    if (fails(is_meant_at("rename", a, old)))
        return -1;
    return REAL("renameat", int (*)(int, const char *, int, const char *))(a, old, b, new);
}

int renameat2(int a, const char *old, int b, const char *new, unsigned flags)
{
    const char *calls = getenv("FAULTS");
    if (fails(is_meant_at("rename", a, old) || (calls && !strcmp(calls, "renameat2"))))
        return -1;
    return REAL("renameat2", int (*)(int, const char *, int, const char *, unsigned))(a, old, b, new, flags);
}

int mkdir(const char *path, mode_t mode)
{
    return fails(is_meant("mkdir", path)) ? -1 : REAL("mkdir", int (*)(const char *, mode_t))(path, mode);
}

int mkdirat(int directory, const char *path, mode_t mode)
{
    if (fails(is_meant_at("mkdir", directory, path)))
        return -1;
    return REAL("mkdirat", int (*)(int, const char *, mode_t))(directory, path, mode);
}
