"""TensorRT's Python interface, as three of its versions have it, computing with ONNX Runtime in fake device memory."""

from __future__ import annotations

import ctypes
import enum
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
KERNEL_NS = 1000


def members(name, *names):
    return enum.IntEnum(name, {each: number for number, each in enumerate(names)})


def fake_tensorrt(cuda, version="10.3.0", *, refuses=(), no_memory=False):
    """A module that stands for ``tensorrt``.

    Args:
        cuda: the fake CUDA whose memory and streams it works with.
        version: decides what there is: before 10 no strong typing and no int64, from 11 on no flags of precision.
        refuses: operators that the parser does not know.
        no_memory: whether no context can be made.

    It keeps ``built``, a record of every engine that was built, and ``ran``, the names of the graphs that ran.
    """
    major = int(version.split(".")[0])
    trt = SimpleNamespace(__version__=version, built=[], ran=[], fails="", refuses_engines=False)

    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING, Severity.INFO

        def __init__(self):
            self.made = True

    class IProgressMonitor:
        def __init__(self):
            self.made = True

    trt.ILogger = ILogger
    if major >= 10:
        trt.IProgressMonitor = IProgressMonitor
    trt.NetworkDefinitionCreationFlag = members(
        "Flags", *(["EXPLICIT_BATCH"] if major < 11 else []), *(["STRONGLY_TYPED"] if major >= 10 else [])
    )
    trt.BuilderFlag = members("BuilderFlag", "TF32", *(["FP16", "INT8"] if major < 11 else []))
    trt.MemoryPoolType = members("MemoryPoolType", "WORKSPACE")
    trt.TensorIOMode = members("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    trt.TensorLocation = members("TensorLocation", "DEVICE", "HOST")
    trt.LayerType = members("LayerType", "OTHER", "QUANTIZE")
    trt.DataType = members("DataType", *(name for name in NUMPY if name != "INT64" or major >= 10))
    kinds = {
        onnx.TensorProto.FLOAT: "FLOAT",
        onnx.TensorProto.FLOAT16: "HALF",
        onnx.TensorProto.INT64: "INT64" if major >= 10 else "INT32",
        onnx.TensorProto.INT32: "INT32",
        onnx.TensorProto.BOOL: "BOOL",
        onnx.TensorProto.INT8: "INT8",
    }

    def tensor(value):
        sides = value.type.tensor_type
        sizes = tuple(-1 if side.dim_param else side.dim_value for side in sides.shape.dim)
        return SimpleNamespace(name=value.name, shape=sizes, dtype=trt.DataType[kinds[sides.elem_type]])

    class Network:
        def __init__(self, flags):
            self.flags = flags
            self.model = None

        @property
        def num_inputs(self):
            return len(self.model.graph.input)

        def get_input(self, index):
            return tensor(self.model.graph.input[index])

        @property
        def num_layers(self):
            return len(self.model.graph.node)

        def get_layer(self, index):
            node = self.model.graph.node[index]
            kind = trt.LayerType.QUANTIZE if node.op_type == "QuantizeLinear" else trt.LayerType.OTHER
            half = node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT16
            made = SimpleNamespace(dtype=trt.DataType.HALF if half else trt.DataType.FLOAT)
            return SimpleNamespace(type=kind, num_outputs=len(node.output), get_output=lambda index: made)

    class ParserError:
        def __init__(self, index, node):
            self.index, self.of = index, node

        def node(self):
            return self.index

        def desc(self):
            return f"Assertion failed:\n no importer for {self.of.op_type}"

        if major >= 10:

            def node_name(self):
                return self.of.name

            def node_operator(self):
                return self.of.op_type

    class OnnxParser:
        def __init__(self, network, logger):
            assert logger.made, "the base class's constructor was not called"
            self.network, self.logger, self.errors = network, logger, []

        def parse_from_file(self, model):
            try:
                self.network.model = onnx.load(model)
            except Exception as error:
                self.logger.log(Severity.ERROR, f"could not read: {type(error).__name__}")
                return False
            nodes = enumerate(self.network.model.graph.node)
            self.errors = [ParserError(index, node) for index, node in nodes if node.op_type in refuses]
            return not self.errors

        @property
        def num_errors(self):
            return len(self.errors)

        def get_error(self, index):
            return self.errors[index]

    class Profile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, input, min, opt, max):  # noqa: A002
            self.shapes[input] = (tuple(min), tuple(opt), tuple(max))

    class Timing:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return self.content

    class Config:
        def __init__(self):
            self.flags = {trt.BuilderFlag.TF32}
            self.profile = Profile()
            self.workspace = None
            self.timing = None
            self.progress_monitor = None

        def set_flag(self, flag):
            self.flags.add(flag)

        def clear_flag(self, flag):
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool, pool_size):
            self.workspace = pool_size

        def add_optimization_profile(self, profile):
            self.profile = profile

        def create_timing_cache(self, serialized_timing_cache):
            return None if serialized_timing_cache == b"refused" else Timing(serialized_timing_cache)

        def set_timing_cache(self, cache, ignore_mismatch):
            self.timing = cache
            return True

        def get_timing_cache(self):
            return self.timing

    class Builder:
        def __init__(self, logger):
            assert logger.made, "the base class's constructor was not called"
            self.logger = logger

        def create_network(self, flags=0):
            return Network(flags)

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            if trt.fails:
                self.logger.log(Severity.ERROR, trt.fails)
                return None
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start("Building", None, 4)
                monitor.phase_start("Inner", "Building", 2)
                for step in range(4):
                    monitor.step_complete("Inner", step % 2)
                    if not monitor.step_complete("Building", step):
                        return None
                monitor.phase_finish("Building")
            config.timing.content += b"+"
            trt.built.append(
                SimpleNamespace(
                    name=network.model.graph.name,
                    flags={flag.name for flag in config.flags},
                    creation={flag.name for flag in trt.NetworkDefinitionCreationFlag if network.flags >> flag & 1},
                    profile=config.profile.shapes,
                    workspace=config.workspace,
                    timing=config.timing.content,
                )
            )
            head = json.dumps({"shapes": config.profile.shapes, "gpu": cuda.facts.name.decode()}).encode()
            return memoryview(head + b"\0" + network.model.SerializeToString())

    class Context:
        def __init__(self, engine):
            self.engine = engine
            self.shapes = {}
            self.addresses = {}
            self.changes = 0
            self.settled = None

        def set_input_shape(self, name, shape):
            least, _, most = self.engine.profile[name]
            if any(not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                return False
            self.changes += self.shapes.get(name) != tuple(shape)
            self.shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name, memory):
            assert memory % 256 == 0, f"'{name}' is not aligned"
            self.changes += self.addresses.get(name) != memory
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            stream = cuda.streams[stream_handle]
            if stream.captured is not None and self.settled != self.changes:
                return False  # shapes were not settled by a run before
            self.settled = self.changes
            assert set(self.addresses) == set(self.engine.tensors), "an input or output has no address"
            shapes, addresses = dict(self.shapes), dict(self.addresses)
            changes, captured = self.changes, stream.captured is not None

            def work():
                assert not captured or self.changes == changes, "a captured context was changed"
                self.engine.run(shapes, addresses)

            stream.add(work)
            return True

    class ICudaEngine:
        def __init__(self, head, model):
            self.profile = {name: [tuple(s) for s in shapes] for name, shapes in head["shapes"].items()}
            self.graph = model.graph
            self.tensors = {each.name: tensor(each) for each in (*model.graph.input, *model.graph.output)}
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(model.SerializeToString(), options)

        @property
        def num_io_tensors(self):
            return len(self.tensors)

        def get_tensor_name(self, index):
            return list(self.tensors)[index]

        def get_tensor_mode(self, name):
            given = name in [each.name for each in self.graph.input]
            return trt.TensorIOMode.INPUT if given else trt.TensorIOMode.OUTPUT

        def get_tensor_location(self, name):
            return trt.TensorLocation.HOST if name.startswith("shape") else trt.TensorLocation.DEVICE

        def get_tensor_dtype(self, name):
            return self.tensors[name].dtype

        def get_tensor_shape(self, name):
            return self.tensors[name].shape

        def create_execution_context(self):
            if no_memory:
                log.log(Severity.ERROR, "OutOfMemory: no memory for activations")
                return None
            return Context(self)

        def run(self, shapes, addresses):
            trt.ran.append(self.graph.name)
            cuda.clock_ns += KERNEL_NS

            def at(name, shape):
                dtype = np.dtype(NUMPY[self.tensors[name].dtype.name])
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                cuda.inside(cuda.device, addresses[name], size)
                raw = (ctypes.c_uint8 * size).from_address(addresses[name])
                return np.frombuffer(raw, dtype=dtype).reshape(shape)

            given = {each.name: at(each.name, shapes.get(each.name, tensor(each).shape)) for each in self.graph.input}
            made = self.session.run(None, {name: array.copy() for name, array in given.items()})
            for each, array in zip(self.graph.output, made, strict=True):
                at(each.name, array.shape)[...] = array

    if major >= 10:
        ICudaEngine.device_memory_size_v2 = 1234
    else:
        ICudaEngine.device_memory_size = 1234
    log = None

    class Runtime:
        def __init__(self, logger):
            nonlocal log
            self.logger = log = logger

        def deserialize_cuda_engine(self, serialized_engine):
            head, _, model = serialized_engine.partition(b"\0")
            told = json.loads(head)
            if told["gpu"] != cuda.facts.name.decode() or trt.refuses_engines:
                self.logger.log(Severity.ERROR, "The engine plan file is not compatible with this GPU")
                return None
            return ICudaEngine(told, onnx.ModelProto.FromString(model))

    trt.Builder, trt.OnnxParser, trt.ParserError, trt.Runtime = Builder, OnnxParser, ParserError, Runtime
    trt.ICudaEngine = ICudaEngine
    return trt
