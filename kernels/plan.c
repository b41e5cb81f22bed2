/* A repeated call of an op, from its tensors to its outputs: what `octavo.kernels.replay` makes plans of.

   Python would take half a call's time here: for the address of each tensor, for the 20 to 60 arguments of each kernel,
   which are sorted into a tuple and taken out of it again, and for the loop around them. This does what that would do,
   in the same order, and hands the kernels to the driver itself. Nothing here is private to a version of Triton or of
   PyTorch: what it calls of theirs is given to it, and the driver is asked whether a kernel has the parameters that it
   will be started with. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include "cuda.h"

#define MAX_TENSORS 64
#define MAX_PARAMETERS 128
#define MAX_STARTS 12

typedef CUresult (*launch_t)(const CUlaunchConfig *, CUfunction, void **, void **);
typedef CUresult (*parameter_t)(CUfunction, size_t, size_t *, size_t *);
typedef CUresult (*text_of_t)(CUresult, const char **);
typedef CUresult (*get_context_t)(CUcontext *);
typedef CUresult (*retain_context_t)(CUcontext *, CUdevice);
typedef CUresult (*set_context_t)(CUcontext);

static launch_t launch_kernel; /* of the driver; without one, whatever `use` is given */
static parameter_t parameter_of;
static PyObject *data_ptr_name;

/* A kernel's parameter: a number, or what depends on where tensor number `tensor` lies: its address, or what the copy
   engine reads of it, which `encodings[address]` has the address of at its end. */
typedef struct {
    int tensor; /* -1: a number */
    uint64_t number;
    PyObject *encodings;
} Parameter;

typedef struct {
    CUfunction function;
    CUlaunchConfig config;
    CUlaunchAttribute chained;
    int count;
    Parameter *parameters;
} Start;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *matches, *miss, *stream_of, *device, *current_device, *elsewhere, *deterministic;
    PyObject *allocate, *release; /* memory without a tensor: (bytes, stream) -> address, and (address) */
    PyObject *plain, *filled;     /* of each output: (function, argument…), or its bytes if no one sees it; a function */
    PyObject *returned;       /* None, the index of an output, or a tuple of them */
    int given, tensors, outputs, starts, index;
    Start *start;
} Plan;

static int failed(CUresult result, const char *what) {
    if (result == CUDA_SUCCESS) return 0;
    const char *message = "unknown error";
    text_of_t error_string = (text_of_t)dlsym(RTLD_DEFAULT, "cuGetErrorString");
    if (error_string) error_string(result, &message);
    PyErr_Format(PyExc_RuntimeError, "%s: CUDA error %d: %s", what, (int)result, message);
    return 1;
}

/* A thread that has done nothing on a GPU yet has no context; the device's own is made current, as CUDA's runtime does. */
static CUresult with_context(int index) {
    get_context_t current = (get_context_t)dlsym(RTLD_DEFAULT, "cuCtxGetCurrent");
    retain_context_t retain = (retain_context_t)dlsym(RTLD_DEFAULT, "cuDevicePrimaryCtxRetain");
    set_context_t set = (set_context_t)dlsym(RTLD_DEFAULT, "cuCtxSetCurrent");
    CUcontext context = NULL;
    if (!current || !retain || !set) return CUDA_ERROR_INVALID_CONTEXT;
    CUresult result = current(&context);
    if (result != CUDA_SUCCESS || context) return CUDA_ERROR_INVALID_CONTEXT; /* that was not it */
    result = retain(&context, index);
    return result == CUDA_SUCCESS ? set(context) : result;
}

/* Where the parameters of a start are: 0, or -1 with an error set. What is held must be let go when it has started. */
static int point(const Start *start, const uint64_t *addresses, void **pointers, PyObject **held, int *holding) {
    static uint64_t nothing = 0;
    for (int i = 0; i < start->count; i++) {
        const Parameter *p = &start->parameters[i];
        if (p->tensor < 0) {
            pointers[i] = (void *)&p->number;
        } else if (!p->encodings) {
            pointers[i] = (void *)&addresses[p->tensor];
        } else {
            PyObject *key = PyLong_FromUnsignedLongLong(addresses[p->tensor]);
            PyObject *encoded = key ? PyObject_GetItem(p->encodings, key) : NULL;
            Py_XDECREF(key);
            if (!encoded) return -1;
            held[(*holding)++] = encoded; /* another thread may empty the table */
            pointers[i] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(encoded, PyTuple_GET_SIZE(encoded) - 1));
            if (PyErr_Occurred()) return -1;
        }
    }
    pointers[start->count] = pointers[start->count + 1] = &nothing; /* Triton's scratch memories, which are unused */
    return 0;
}

static int begin(const Plan *plan, CUstream stream, const uint64_t *addresses) {
    void *pointers[MAX_STARTS][MAX_PARAMETERS + 2];
    PyObject *held[MAX_TENSORS];
    int holding = 0, bad = 0;
    CUresult result = CUDA_SUCCESS;
    for (int i = 0; i < plan->starts && !bad; i++) bad = point(&plan->start[i], addresses, pointers[i], held, &holding);
    if (!bad) {
        Py_BEGIN_ALLOW_THREADS /* the driver waits where too many kernels are in the queue */
        for (int i = 0; i < plan->starts && result == CUDA_SUCCESS; i++) {
            CUlaunchConfig config = plan->start[i].config;
            config.hStream = stream;
            result = launch_kernel(&config, plan->start[i].function, pointers[i], NULL);
            if (result == CUDA_ERROR_INVALID_CONTEXT && with_context(plan->index) == CUDA_SUCCESS)
                result = launch_kernel(&config, plan->start[i].function, pointers[i], NULL);
        }
        Py_END_ALLOW_THREADS
        bad = failed(result, "starting a kernel");
    }
    while (holding) Py_DECREF(held[--holding]);
    return bad ? -1 : 0;
}

static PyObject *results_of(const Plan *plan, PyObject *const *outputs) {
    if (plan->returned == Py_None) Py_RETURN_NONE;
    if (!PyTuple_CheckExact(plan->returned)) return Py_NewRef(outputs[PyLong_AsLong(plan->returned)]);
    Py_ssize_t count = PyTuple_GET_SIZE(plan->returned);
    PyObject *results = PyTuple_New(count);
    for (Py_ssize_t i = 0; results && i < count; i++)
        PyTuple_SET_ITEM(results, i, Py_NewRef(outputs[PyLong_AsLong(PyTuple_GET_ITEM(plan->returned, i))]));
    return results;
}

static int address_of(PyObject *tensor, uint64_t *address) {
    PyObject *value = PyObject_VectorcallMethod(data_ptr_name, &tensor, 1, NULL);
    if (!value) return -1;
    *address = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *call(PyObject *self, PyObject *const *args, size_t flags, PyObject *names) {
    Plan *plan = (Plan *)self;
    PyObject *tensors[MAX_TENSORS], *outputs[MAX_TENSORS], *results = NULL, *answer;
    uint64_t addresses[MAX_TENSORS], all = 0;
    int count = 0, made = 0;
    if (names || PyVectorcall_NARGS(flags) != plan->given) {
        PyErr_Format(PyExc_TypeError, "a plan takes %d tensors, by position", plan->given);
        return NULL;
    }
    for (int i = 0; i < plan->given; i++)
        if (args[i] != Py_None) tensors[count++] = args[i];
    if (count != plan->tensors) return Py_NewRef(plan->miss);
    if (!(answer = PyObject_Vectorcall(plan->matches, tensors, count, NULL))) return NULL;
    Py_DECREF(answer);
    if (answer != Py_True) return Py_NewRef(plan->miss);
    if (plan->current_device != Py_None) {
        if (!(answer = PyObject_CallNoArgs(plan->current_device))) return NULL;
        long current = PyLong_AsLong(answer);
        Py_DECREF(answer);
        if (current != plan->index) {
            PyObject *all_args[MAX_TENSORS + 1] = {self};
            memcpy(all_args + 1, args, plan->given * sizeof(*args));
            return PyObject_Vectorcall(plan->elsewhere, all_args, plan->given + 1, NULL);
        }
    }
    for (int i = 0; i < count; i++) {
        if (address_of(tensors[i], &addresses[i])) return NULL;
        all |= addresses[i];
    }
    if (all & 15) return Py_NewRef(plan->miss);

    int fill = 0;
    PyObject *stream = PyObject_CallOneArg(plan->stream_of, plan->device);
    if (!stream) return NULL;
    if (plan->outputs) {
        if (!(answer = PyObject_CallNoArgs(plan->deterministic))) goto end;
        fill = answer == Py_True;
        Py_DECREF(answer);
    }
    while (made < plan->outputs) {
        PyObject *plain = PyTuple_GET_ITEM(plan->plain, made), *out;
        if (fill) {
            out = PyObject_CallNoArgs(PyTuple_GET_ITEM(plan->filled, made));
        } else if (PyLong_CheckExact(plain)) {
            out = PyObject_Vectorcall(plan->allocate, (PyObject *[]){plain, stream}, 2, NULL);
        } else {
            PyObject *const *how = &PyTuple_GET_ITEM(plain, 0);
            out = PyObject_Vectorcall(how[0], how + 1, PyTuple_GET_SIZE(plain) - 1, NULL);
        }
        if (!out) goto end;
        outputs[made++] = out;
        uint64_t *address = &addresses[count + made - 1];
        if (PyLong_CheckExact(out)) *address = PyLong_AsUnsignedLongLong(out);
        else if (address_of(out, address)) goto end;
    }
    if (plan->starts && begin(plan, (CUstream)PyLong_AsVoidPtr(stream), addresses)) goto end;
    results = results_of(plan, outputs);
end:
    Py_DECREF(stream);
    while (made) {
        PyObject *out = outputs[--made];
        /* The memory is for what comes later on this stream, as that of a tensor that is let go. */
        if (PyLong_CheckExact(out)) {
            PyObject *type, *value, *trace;
            PyErr_Fetch(&type, &value, &trace);
            answer = PyObject_CallOneArg(plan->release, out);
            if (!answer) PyErr_WriteUnraisable(plan->release);
            Py_XDECREF(answer);
            PyErr_Restore(type, value, trace);
        }
        Py_DECREF(out);
    }
    return results;
}

/* Below: making a plan, once. */

static void free_plan(PyObject *self) {
    Plan *plan = (Plan *)self;
    PyObject *of[] = {plan->matches,   plan->miss,  plan->stream_of, plan->device,  plan->current_device,
                      plan->elsewhere, plan->plain, plan->filled,    plan->returned, plan->deterministic,
                      plan->allocate,  plan->release};
    for (size_t i = 0; i < sizeof(of) / sizeof(*of); i++) Py_XDECREF(of[i]);
    for (int i = 0; plan->start && i < plan->starts; i++) {
        Start *start = &plan->start[i];
        for (int j = 0; start->parameters && j < start->count; j++) Py_XDECREF(start->parameters[j].encodings);
        PyMem_Free(start->parameters);
    }
    PyMem_Free(plan->start);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static int read_parameters(Start *start, PyObject *parameters, int addresses) {
    start->count = (int)PyTuple_GET_SIZE(parameters);
    if (start->count > MAX_PARAMETERS) {
        PyErr_Format(PyExc_ValueError, "%d parameters, at most %d", start->count, MAX_PARAMETERS);
        return -1;
    }
    if (!(start->parameters = PyMem_Calloc(start->count + 1, sizeof(Parameter)))) return -1;
    for (int i = 0; i < start->count; i++) {
        Parameter *p = &start->parameters[i];
        unsigned long long number;
        PyObject *encodings;
        Py_ssize_t bytes;
        size_t offset, size;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(parameters, i), "niKO", &bytes, &p->tensor, &number, &encodings))
            return -1;
        p->number = number;
        if (encodings != Py_None) p->encodings = Py_NewRef(encodings);
        if (p->tensor >= addresses || (p->encodings && p->tensor < 0)) {
            PyErr_Format(PyExc_ValueError, "parameter %d: no tensor %d", i, p->tensor);
            return -1;
        }
        if (parameter_of) {
            if (failed(parameter_of(start->function, i, &offset, &size), "a kernel's parameters")) return -1;
            if (size != (size_t)bytes) {
                PyErr_Format(PyExc_ValueError, "parameter %d has %zu bytes in the kernel, not %zd", i, size, bytes);
                return -1;
            }
        }
    }
    size_t offset, size;
    for (int i = 0; parameter_of && i < 3; i++) {
        int there = parameter_of(start->function, start->count + i, &offset, &size) == CUDA_SUCCESS;
        if (there != (i < 2) || (there && size != 8)) {
            PyErr_SetString(PyExc_ValueError, "the kernel does not end in two pointers to scratch memories");
            return -1;
        }
    }
    return 0;
}

static int read_start(Start *start, PyObject *of, int addresses) {
    unsigned long long function;
    int x, y, z, warps, shared, chained;
    PyObject *parameters;
    if (!PyArg_ParseTuple(of, "K(iii)iipO!", &function, &x, &y, &z, &warps, &shared, &chained, &PyTuple_Type,
                          &parameters))
        return -1;
    start->function = (CUfunction)(uintptr_t)function;
    start->config.gridDimX = x, start->config.gridDimY = y, start->config.gridDimZ = z;
    start->config.blockDimX = 32 * warps, start->config.blockDimY = 1, start->config.blockDimZ = 1;
    start->config.sharedMemBytes = shared;
    if (chained) {
        start->chained.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        start->chained.value.programmaticStreamSerializationAllowed = 1;
        start->config.attrs = &start->chained;
        start->config.numAttrs = 1;
    }
    return read_parameters(start, parameters, addresses);
}

static PyObject *new_plan(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *matches, *miss, *stream_of, *device, *current_device, *elsewhere, *deterministic, *allocate, *release,
        *plain, *filled, *returned, *starts;
    int given, tensors;
    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "arguments go by position");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOOO!OOOiiOOO!O!OO!", &matches, &miss, &stream_of, &PyLong_Type, &device,
                          &current_device, &elsewhere, &deterministic, &given, &tensors, &allocate, &release,
                          &PyTuple_Type, &plain, &PyTuple_Type, &filled, &returned, &PyTuple_Type, &starts))
        return NULL;
    Py_ssize_t outputs = PyTuple_GET_SIZE(plain), launches = PyTuple_GET_SIZE(starts);
    if (given > MAX_TENSORS || given + outputs > MAX_TENSORS || launches > MAX_STARTS) {
        PyErr_Format(PyExc_ValueError, "%d tensors, %zd outputs and %zd kernels are too many", given, outputs, launches);
        return NULL;
    }
    Plan *plan = (Plan *)type->tp_alloc(type, 0);
    if (!plan) return NULL;
    plan->vectorcall = call;
    plan->matches = Py_NewRef(matches), plan->miss = Py_NewRef(miss), plan->stream_of = Py_NewRef(stream_of);
    plan->device = Py_NewRef(device), plan->current_device = Py_NewRef(current_device);
    plan->elsewhere = Py_NewRef(elsewhere), plan->deterministic = Py_NewRef(deterministic);
    plan->allocate = Py_NewRef(allocate), plan->release = Py_NewRef(release);
    plan->plain = Py_NewRef(plain), plan->filled = Py_NewRef(filled), plan->returned = Py_NewRef(returned);
    plan->given = given, plan->tensors = tensors, plan->outputs = (int)outputs, plan->starts = (int)launches;
    plan->index = (int)PyLong_AsLong(device);
    plan->start = PyMem_Calloc(launches + 1, sizeof(Start));
    int bad = !plan->start || PyErr_Occurred() != NULL;
    for (Py_ssize_t i = 0; !bad && i < launches; i++)
        bad = read_start(&plan->start[i], PyTuple_GET_ITEM(starts, i), tensors + (int)outputs);
    if (bad) {
        Py_DECREF(plan);
        return NULL;
    }
    return (PyObject *)plan;
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Plan, vectorcall), READONLY, NULL},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new_plan}, {Py_tp_dealloc, free_plan}, {Py_tp_call, PyVectorcall_Call}, {Py_tp_members, members}, {0},
};

static PyType_Spec spec = {
    "octavo.kernels.plan.Plan", sizeof(Plan), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots,
};

/* use(launch, parameter): the addresses of functions in place of the driver's, for tests; 0 for none. */
static PyObject *use(PyObject *module, PyObject *args) {
    unsigned long long launch, parameter;
    if (!PyArg_ParseTuple(args, "KK", &launch, &parameter)) return NULL;
    launch_kernel = (launch_t)(uintptr_t)launch;
    parameter_of = (parameter_t)(uintptr_t)parameter;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"use", use, METH_VARARGS, NULL}, {NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "plan", NULL, -1, functions};

PyMODINIT_FUNC PyInit_plan(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    if (driver) {
        launch_kernel = (launch_t)dlsym(driver, "cuLaunchKernelEx");
        parameter_of = (parameter_t)dlsym(driver, "cuFuncGetParamInfo");
    }
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = PyType_FromSpec(&spec);
    data_ptr_name = PyUnicode_InternFromString("data_ptr");
    if (!module || !type || !data_ptr_name || PyModule_AddObject(module, "Plan", type)) return NULL;
    /* A driver that can not be asked for a kernel's parameters (before 12.4) is not handed any. */
    if (PyModule_AddIntConstant(module, "has_driver", launch_kernel && parameter_of)) return NULL;
    return module;
}
