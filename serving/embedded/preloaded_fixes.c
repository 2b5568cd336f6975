/* Keeps clients from meeting seven faults of Triton 2.51; preloaded into tritonserver (preloaded_fixes.py, docs/triton.md).
 *
 * It wakes Triton's dynamic batcher in time. If the queue has a bound or a time-out, the batcher takes a request only
 * while an instance is free, and waits on a condition variable for at most 500 ms (dynamic_batch_scheduler.cc). An
 * instance that finishes notifies the batcher just before it counts as free. In two cases the batcher misses that and
 * sleeps beside a free instance, until the next request or for the 500 ms:
 * - it holds a request and checks before the instance counts as free (WaitForPayloadSlotAvailable), or
 * - it holds none and a request arrives between the two: no instance is free yet, so the request does not wake it.
 *
 * The first wait is recognized by its mutex, which is on the waiting thread's own stack; the second by its half second.
 * Both are cut to the time since the thread was last notified, or since a first wait began, but at least a tenth of a
 * millisecond. So the batcher soon checks again after it was notified too early, and seldom while a batch is computed, which
 * would take the core from it. To the caller it is a spurious wake-up; this also affects other waits of half a second. All
 * other waits are passed on unchanged.
 *
 * It also keeps a request that asks for classes of an output with strings from ending the server: TopkClassifications
 * (classification.cc) divides by the size of a string, which Triton gives as 0. Then it sees that it has no classes of
 * strings, and says so.
 *
 * It also refuses an input without rows and columns. The Python backend drops requests whose rows add up to 0
 * (ProcessRequests in python_be.cc): they would get no answer, and keep the model's processes when it is unloaded.
 *
 * It also keeps gRPC calls that are cancelled just as their answer arrives from ending the server. Two threads release such
 * a call: the one that brings the answer (InferResponseComplete in grpc/infer_handler.cc), if it sees the cancellation, and
 * the one that handles it. The first now sends the answer, as if there was no cancellation. gRPC drops it.
 *
 * It also keeps answers over HTTP from being lost. An answer is handed to the HTTP thread of its connection through a
 * socket pair (evthr_defer in libevhtp), which holds 278 of them. Triton ignores that it is full, and the caller waits until its
 * own time-out. Now the sender waits until the thread has taken some.
 *
 * It also makes a request over HTTP with wrong JSON, such as a number in place of a text, or fewer numbers than its shape has, a
 * 400. Triton calls it an internal error, a 500, which callers retry and which counts as the server's failure.
 *
 * It also keeps clients and other users out of the memory through which Triton talks to its models' processes. If /dev/shm is
 * full, an answer names a region of it (CVE-2025-23319), and a client could register that region as its own, and write to
 * it. The program tritonserver now cannot open these regions: its Python backend and the models' processes
 * can. Only their owner can read them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

enum { FRAME_BYTES = 4096, STRINGS = 13 /* TRITONSERVER_TYPE_BYTES */ };
enum { INTERNAL = 1, INVALID = 3 }; /* TRITONSERVER_ERROR_INTERNAL, TRITONSERVER_ERROR_INVALID_ARG */
static const int64_t MS = 1000000, SECOND = 1000000000;

typedef int (*clockwait)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);

static clockwait libc_clockwait;

__attribute__((constructor)) static void find_libc(void)
{
    libc_clockwait = (clockwait)(intptr_t)dlsym(RTLD_NEXT, "pthread_cond_clockwait");
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *end)
{
    static __thread int64_t notified; /* when this thread was last notified, in ns */
    struct timespec now;
    if (clock_gettime(clock, &now) != 0)
        return libc_clockwait(condition, mutex, clock, end);
    int64_t seconds = end->tv_sec - now.tv_sec; /* an endless wait would overflow in nanoseconds */
    int64_t left = (seconds > 2 ? 2 : seconds) * SECOND + end->tv_nsec - now.tv_nsec;
    int holds_a_request = (uintptr_t)mutex - (uintptr_t)__builtin_frame_address(0) < FRAME_BYTES;
    int holds_none = !holds_a_request && left > 400 * MS && left <= 500 * MS;
    if (notified == 0)
        notified = now.tv_sec * SECOND + now.tv_nsec;
    int64_t waited = now.tv_sec * SECOND + now.tv_nsec - notified;
    if (holds_a_request && waited > 500 * MS - left)
        waited = 500 * MS - left;
    int64_t cut = holds_a_request || holds_none ? (waited > MS / 10 ? waited : MS / 10) : left;
    int64_t nsec = now.tv_nsec + cut;
    struct timespec soon = {.tv_sec = now.tv_sec + nsec / SECOND, .tv_nsec = nsec % SECOND};
    int status = libc_clockwait(condition, mutex, clock, cut < left ? &soon : end);
    if (status == 0 && clock_gettime(clock, &now) == 0)
        notified = now.tv_sec * SECOND + now.tv_nsec;
    return status == ETIMEDOUT && cut < left ? 0 : status;
}

void *TRITONSERVER_InferenceRequestAddInput(void *request, const char *name, int type, const int64_t *shape, uint64_t dims)
{
    for (uint64_t axis = 1; axis < dims && shape[0] == 0; axis++)
        if (shape[axis] == 0)
            return ((void *(*)(int, const char *))(intptr_t)dlsym(RTLD_NEXT, "TRITONSERVER_ErrorNew"))(
                INVALID, "the batch has no rows; send one at least");
    void *(*original)(void *, const char *, int, const int64_t *, uint64_t) =
        (void *(*)(void *, const char *, int, const int64_t *, uint64_t))(intptr_t)dlsym(RTLD_NEXT, __func__);
    return original(request, name, type, shape, dims);
}

/* Whether the server's own program made the call, not a backend or a library. */
static int is_programs(const void *caller)
{
    Dl_info callers, program;
    return dladdr(caller, &callers) && dladdr((void *)(uintptr_t)getauxval(AT_ENTRY), &program) &&
           callers.dli_fbase == program.dli_fbase;
}

/* The program's messages about JSON that it reads: broken JSON, a value of another type, numbers that do not fill the shape. */
void *TRITONSERVER_ErrorNew(int code, const char *message)
{
    static const char *const about_json[] = {
        "failed to parse the request JSON", "attempt to access ", "Unable to parse 'data': Shape does not match"};
    void *(*original)(int, const char *) = (void *(*)(int, const char *))(intptr_t)dlsym(RTLD_NEXT, __func__);
    int is_callers = 0;
    for (size_t place = 0; code == INTERNAL && place < sizeof about_json / sizeof *about_json; place++)
        is_callers |= strncmp(message, about_json[place], strlen(about_json[place])) == 0;
    is_callers = is_callers && is_programs(__builtin_return_address(0));
    return original(is_callers ? INVALID : code, message);
}

/* The program sends this size only to its HTTP threads. If the thread takes nothing for a second, the answer is lost as before. */
ssize_t send(int socket, const void *data, size_t size, int flags)
{
    enum { COMMAND_BYTES = 17, WAIT_MS = 1000 };
    struct pollfd pair = {.fd = socket, .events = POLLOUT};
    ssize_t sent;
    do
        sent = sendto(socket, data, size, flags, NULL, 0);
    while (sent < 0 && errno == EAGAIN && size == COMMAND_BYTES && is_programs(__builtin_return_address(0)) &&
           poll(&pair, 1, WAIT_MS) > 0);
    return sent;
}

static __thread int made_private = -1; /* the region that this thread opened last, until its mode is set */

/* Regions of this prefix (server_process.py) are between Triton and its models' processes. Like libc, it skips slashes. */
int shm_open(const char *name, int flags, mode_t mode)
{
    static const char prefix[] = "embedded-triton-";
    int (*original)(const char *, int, mode_t) = (int (*)(const char *, int, mode_t))(intptr_t)dlsym(RTLD_NEXT, __func__);
    if (strncmp(name + strspn(name, "/"), prefix, sizeof prefix - 1) != 0)
        return original(name, flags, mode);
    /* The models' processes have the library too, and open theirs. */
    if (is_programs(__builtin_return_address(0)) && strcmp(program_invocation_short_name, "tritonserver") == 0) {
        errno = EACCES;
        return -1;
    }
    return made_private = original(name, flags, mode & S_IRWXU);
}

/* The backend (boost::interprocess) sets the mode of a region that it has made to 0644. */
int fchmod(int file, mode_t mode)
{
    int (*original)(int, mode_t) = (int (*)(int, mode_t))(intptr_t)dlsym(RTLD_NEXT, __func__);
    int is_region = file >= 0 && file == made_private;
    made_private = -1;
    return original(file, is_region ? mode & S_IRWXU : mode);
}

/* The size of a string is 1 for the server's own program, whose other uses of it are for other types. Backends get 0. */
uint32_t TRITONSERVER_DataTypeByteSize(int type)
{
    uint32_t (*original)(int) = (uint32_t (*)(int))(intptr_t)dlsym(RTLD_NEXT, "TRITONSERVER_DataTypeByteSize");
    return type == STRINGS && is_programs(__builtin_return_address(0)) ? 1 : original(type);
}

/* InferResponseComplete of Triton 2.51 in nvidia-pytriton 0.7.0: skips what it does for a cancelled call if it was not told
 * of a cancellation (cmpb $0, received_notification_; je). The patch always skips it (nop; jmp). Other programs are not changed.
 */
__attribute__((constructor)) static void answer_cancelled_calls(void)
{
    static const uint8_t known[] = {0x41, 0x80, 0xbd, 0x60, 0x01, 0, 0, 0, 0x0f, 0x84, 0xbb, 0x02, 0, 0};
    static const uint8_t always[] = {0x90, 0xe9};
    static const uintptr_t check = 0x1f3467;
    const Elf64_Phdr *first = (const Elf64_Phdr *)(uintptr_t)getauxval(AT_PHDR), *end = first + getauxval(AT_PHNUM);
    uintptr_t base = 0, page = getauxval(AT_PAGESZ);
    for (const Elf64_Phdr *part = first; part < end; part++) {
        if (part->p_type == PT_PHDR)
            base = (uintptr_t)first - part->p_vaddr;
        uint8_t *code = (uint8_t *)(base + check), *jump = code + 8;
        if (part->p_type != PT_LOAD || !(part->p_flags & PF_X) || check < part->p_vaddr ||
            check + sizeof known > part->p_vaddr + part->p_memsz || memcmp(code, known, sizeof known) != 0)
            continue;
        void *start = (void *)((uintptr_t)jump & -page); /* both bytes of the jump are on one page */
        if (mprotect(start, page, PROT_READ | PROT_WRITE | PROT_EXEC) == 0) { /* refused: the code stays as it is */
            memcpy(jump, always, sizeof always);
            mprotect(start, page, PROT_READ | PROT_EXEC);
        }
    }
}
