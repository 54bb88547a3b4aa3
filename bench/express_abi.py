"""The C ABI of Express through ctypes, for the benchmarks: tensors are NumPy arrays (CPU) or PyTorch's (CPU or CUDA)."""
import ctypes as C

CPU, CUDA = 1, 2  # express_device_type
F32, F16, BF16, I8 = 0, 1, 2, 3  # express_dtype
COIN = 1  # express_halving


class Config(C.Structure):  # express_config
    _fields_ = (
        [("struct_size", C.c_uint32)]
        + [(n, C.c_int32) for n in ("layers", "query_heads", "kv_heads", "key_dim", "value_dim")]
        + [("scale", C.c_double)]
        + [(n, C.c_int32) for n in ("dtype", "device_type", "device_id", "first_layer", "first_kv_head", "budget_unit")]
        + [(n, C.c_int64) for n in ("budget", "sinks", "window", "protected_entries", "rollback_reserve")]
        + [("head_share", C.c_void_p), ("head_share_count", C.c_int64), ("head_settings", C.c_void_p),
           ("head_settings_count", C.c_int64), ("schedule", C.c_int32), ("halving", C.c_int32)]
        + [(n, C.c_double) for n in ("weight_exponent", "gamma", "tau", "delta", "level_fraction")]
        + [("level_floor", C.c_int64), ("max_levels", C.c_int64), ("seed", C.c_uint64)]
        + [(n, C.c_int32) for n in ("prefill_block", "auto_compress", "validate", "threads")]
        + [("parallel_for", C.c_void_p), ("parallel_for_context", C.c_void_p), ("stream", C.c_void_p)]
        + [("head_budgets", C.c_int32), ("protection_score", C.c_int32), ("rope_frequencies", C.c_void_p),
           ("rope_frequency_count", C.c_int64), ("rope_layout", C.c_int32), ("reserved", C.c_int32)])


class Tensor(C.Structure):  # express_tensor
    _fields_ = [("data", C.c_void_p), ("device_type", C.c_int32), ("device_id", C.c_int32), ("dtype", C.c_int32),
                ("ndim", C.c_int32), ("shape", C.POINTER(C.c_int64)), ("strides", C.POINTER(C.c_int64))]


class Workspace(C.Structure):  # express_workspace
    _fields_ = [("data", C.c_void_p), ("bytes", C.c_size_t)]


class Express:
    def __init__(self, path):
        self.lib = C.CDLL(path)
        self.lib.express_last_error.restype = C.c_char_p
        self.lib.express_destroy.restype = None

    def call(self, name, *args):
        status = getattr(self.lib, name)(*args)
        if status:
            raise RuntimeError(f"{name}: {status}: {self.lib.express_last_error().decode()}")

    def view(self, t):
        """Of a tensor or array of float32 or bfloat16 (NumPy: its bits as uint16), which lives as long as the view."""
        dims = C.c_int64 * t.ndim
        if hasattr(t, "data_ptr"):
            data, device, index = t.data_ptr(), CUDA if t.is_cuda else CPU, t.device.index or 0
            strides = dims(*t.stride())
            dtype = {"torch.float32": F32, "torch.float16": F16, "torch.bfloat16": BF16}[str(t.dtype)]
        else:
            data, device, index = t.ctypes.data, CPU, 0
            strides = dims(*(s // t.itemsize for s in t.strides))
            dtype = {"float32": F32, "float16": F16, "uint16": BF16}[t.dtype.name]
        view = Tensor(data, device, index, dtype, t.ndim, dims(*t.shape), strides)
        view.keep = t
        return view

    def config(self, **fields):
        config = Config()
        self.call("express_config_init", C.byref(config), C.c_uint32(C.sizeof(Config)))
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    def create(self, **fields):
        config = self.config(**fields)
        cache = C.c_void_p()
        self.call("express_create", C.byref(config), C.byref(cache))
        return cache

    def destroy(self, cache):
        self.lib.express_destroy(C.byref(cache))

    def prefill(self, cache, layer, q, k, v, out):
        """On the CPU, where no workspace is needed."""
        self.call("express_prefill", cache, C.c_int32(layer), *[C.byref(self.view(t)) for t in (q, k, v, out)], None, None)
