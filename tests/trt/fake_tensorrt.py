"""A strict TensorRT: the module of one version, made from its surface.

It has the members that this version has and no other; every call is held against the real signatures, and every use is recorded
in `used` as (class, member). What a class does is in the classes of `BEHAVIOUR`; a member without one raises NotModelled.

    trt = fake_tensorrt(surface(version), gpus)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from trt.fake_build import BUILD
from trt.fake_engine import ENGINE
from trt.fake_network import NETWORK
from trt.fake_refit import REFIT
from trt.signature import Signature, bind
from trt.streams import Gpus
from trt.strict import BadCall, NotModelled, Strictness
from trt.surface import Class, Member, Surface

BEHAVIOUR: dict[str, type] = {**NETWORK, **BUILD, **ENGINE, **REFIT}
_AS_EVER = object()
_SUBCLASSED = (
    *("ILogger", "IProgressMonitor", "IStreamReader", "IStreamReaderV2", "IStreamWriter", "IOutputAllocator"),
    "IDebugListener",
)


class FakeTensorRT(types.ModuleType):
    """The module; its own names are in `used` with "" for the class.

    `make(name, behaviour)` is an object of one of its classes, as the real functions return them.
    """

    def __init__(self, surface: Surface, gpus: Gpus) -> None:
        super().__init__(surface.module)
        self.__dict__["surface_"], self.__dict__["gpus_"] = surface, gpus
        self.used: set[tuple[str, str]] = set()
        self.__version__ = surface.version
        self.classes_: dict[str, Any] = {}
        self.planned_: dict[str, list[Any]] = {}
        for name in surface.classes:
            self._class(name)

    def __getattr__(self, name: str) -> Any:  # only what is not found otherwise
        surface = self.__dict__["surface_"]
        if name in surface.classes:
            self.used.add(("", name))
            return self.classes_[name]
        if name in surface.constants:
            enumeration, member = surface.constants[name]
            return getattr(self.classes_[enumeration], member)
        if name in surface.functions:
            self.used.add(("", name))
            return self._function(name, surface.functions[name])
        raise AttributeError(f"module '{surface.module}' has no attribute '{name}'")

    @property
    def rtx(self) -> bool:
        return self.surface_.module == "tensorrt_rtx"

    def make(self, name: str, behaviour: Any = None) -> Any:
        cls = self.classes_[name]
        made = cls.__new__(cls)
        if isinstance(made, bytearray):
            bytearray.extend(made, behaviour)
        made._behaviour = behaviour
        return made

    def enum(self, name: str, member: str) -> Any:
        """A member for the fake's own use: not recorded."""
        return self.classes_[name]._members[member]

    def instance(self, value: Any, kind: str) -> bool | None:
        """Whether `value` is of the class that a signature calls `kind`; None where that is a name from C++."""
        cls = self.classes_.get(kind)
        if cls is None:
            return None
        return isinstance(value, cls)

    def fail_next(self, path: str, result: Any = None, *, after: int = 0) -> None:
        """The next call of "Class.method", or the one `after` that many more, does nothing and returns `result`."""
        if not self.surface_.has(path):
            raise KeyError(path)
        self.planned_.setdefault(path, []).extend([_AS_EVER] * after + [result])

    # -- making the classes

    def _class(self, name: str) -> type:
        if name in self.classes_:
            return self.classes_[name]  # type: ignore[no-any-return]
        described: Class = self.surface_.classes[name]
        if described.is_enum:
            self.classes_[name] = made = _enumeration(self, described)
            return made
        bases: tuple[type, ...] = tuple(self._class(base) for base in described.bases)
        namespace: dict[str, Any] = {"__slots__": () if bases else ("_behaviour", "__weakref__"), "__module__": self.__name__}
        if name == "IHostMemory":
            bases = (bytearray,)  # for its buffer; what else a bytearray has is hidden
            namespace |= dict.fromkeys(("__len__", "__getitem__", "__setitem__", "__iter__", "__contains__"))
            namespace |= {key: property() for key in dir(bytearray) if not key.startswith("_")}
        for key, member in described.members.items():
            if member.kind in ("method", "static"):
                namespace[key] = self._method(name, key, member)
            elif member.kind == "property":
                namespace[key] = self._property(name, key, member)
        namespace.pop("__del__", None)
        if "__init__" not in described.members:
            namespace["__init__"] = _no_constructor
        made = _Meta(name.rsplit(".", 1)[-1], bases or (object,), namespace)
        made._fake, made._path = self, name  # type: ignore[attr-defined]
        self.classes_[name] = made
        return made

    def _method(self, name: str, key: str, member: Member) -> Any:
        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.used.add((name, key))
            bound = self._bound(f"{name}.{key}", member.signatures, args, kwargs)
            if key == "__init__":
                behaviour = BEHAVIOUR.get(name)
                if behaviour is None and name not in _SUBCLASSED:
                    raise NotModelled(f"{name}()")
                this._behaviour = behaviour(self, **bound) if behaviour else None
                return None
            planned = self.planned_.get(f"{name}.{key}")
            result = planned.pop(0) if planned else _AS_EVER
            if result is _AS_EVER:
                result = self._behaviour(this, name, key)(**bound)
            return self._returned(f"{name}.{key}", member.signatures, result)

        method.__name__ = key
        return method

    def _property(self, name: str, key: str, member: Member) -> property:
        def get(this: Any) -> Any:
            self.used.add((name, key))
            behaviour = this._behaviour
            if not hasattr(behaviour, key):
                raise NotModelled(f"{self.__name__} {self.__version__}: {name}.{key} is not modelled")
            return self._returned(f"{name}.{key}", member.signatures, getattr(behaviour, key))

        def put(this: Any, value: Any) -> None:
            self.used.add((name, key))
            bound = self._bound(f"{name}.{key}", member.setters, (value,), {})
            behaviour = this._behaviour
            if not hasattr(behaviour, key):
                raise NotModelled(f"{self.__name__} {self.__version__}: {name}.{key} is not modelled")
            setattr(behaviour, key, next(iter(bound.values())))

        return property(get if member.readable else None, put if member.writable else None)

    def _function(self, name: str, signatures: tuple[Signature, ...]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            self._bound(name, signatures, args, kwargs)
            raise NotModelled(f"{self.__name__} {self.__version__}: {name}() is not modelled")

        return function

    # -- calls

    def _bound(self, where: str, signatures: tuple[Signature, ...], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        faults = []
        for signature in signatures:
            bound = bind(signature, args, kwargs, self.instance)
            if not isinstance(bound, str):
                return bound
            faults.append(f"{signature}: {bound}")
        raise BadCall(f"{self.__name__} {self.__version__}: {where} was called wrongly:\n" + "\n".join(faults))

    def _behaviour(self, this: Any, name: str, key: str) -> Callable[..., Any]:
        behaviour = getattr(this, "_behaviour", None)
        if not hasattr(behaviour, key):
            raise NotModelled(f"{self.__name__} {self.__version__}: {name}.{key}() is not modelled")
        return getattr(behaviour, key)  # type: ignore[no-any-return]

    def _returned(self, where: str, signatures: tuple[Signature, ...], value: Any) -> Any:
        """`value`, which the fake's own behaviour returned: it must be what the real function can return."""
        for kind in [signature.returns for signature in signatures]:
            plain = {"int": int, "str": (str, type(None)), "bool": bool, "float": float, "None": type(None)}.get(
                kind
            )  # str: char*
            wanted = plain if plain is not None else self.classes_.get(kind, object)
            if isinstance(value, wanted) and (kind != "int" or type(value) is int):
                return value
            if value is None and kind in self.classes_:
                return value
        if not signatures:
            return value
        raise AssertionError(f"the fake's own {where} returned {value!r}, not {signatures[0].returns}")


class _Meta(type):
    """Members of enumerations that a class lends (`ILogger.ERROR`) and nested classes (`ILogger.Severity`)."""

    _fake: FakeTensorRT
    _path: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not hasattr(made, "_behaviour"):
            raise TypeError(f"{cls._fake.__name__}.{cls._path}.__init__() must be called when overriding __init__")
        return made

    def __getattr__(cls, key: str) -> Any:
        fake, path = cls._fake, cls._path
        found = fake.surface_.find(path, key)
        if found is None or found[1].kind not in ("enum", "class"):
            raise AttributeError(f"type object '{fake.__name__}.{cls.__name__}' has no attribute '{key}'")
        fake.used.add((found[0], key))
        target = fake.classes_[found[1].target]
        return target if found[1].kind == "class" else target._members[found[1].value]


class _EnumMeta(_Meta):
    _members: dict[str, Any]
    __members__ = property(lambda cls: dict(cls._members))

    def __getattr__(cls, key: str) -> Any:
        if key in cls._members:
            cls._fake.used.add((cls._path, key))
            return cls._members[key]
        raise AttributeError(f"type object '{cls._fake.__name__}.{cls.__name__}' has no attribute '{key}'")


def _no_constructor(this: Any, *args: Any, **kwargs: Any) -> None:
    raise TypeError(f"{type(this).__name__}: No constructor defined!")


def _enumeration(fake: FakeTensorRT, described: Class) -> type:
    """As pybind11 makes them: equal only to themselves, convertible by int()."""

    def init(this: Any, value: int) -> None:
        raise Strictness(f"{described.name}({value}): name the member")

    def bit(this: Any) -> int:
        return this.value  # type: ignore[no-any-return]

    namespace: dict[str, Any] = {
        "__slots__": ("name", "value"),
        "__init__": init,
        "__int__": bit,
        "__index__": bit,
        "__repr__": lambda this: f"<{type(this).__name__}.{this.name}: {this.value}>",
        "__str__": lambda this: f"{type(this).__name__}.{this.name}",
        "__hash__": bit,
        "__eq__": lambda this, other: type(this) is type(other) and this.value == other.value,
    }
    if described.name == "DataType":
        namespace["itemsize"] = property(lambda this: _ITEM_SIZES[this.name])
    made = _EnumMeta(described.name.rsplit(".", 1)[-1], (object,), namespace)
    made._fake, made._path, made._members = fake, described.name, {}
    for key, value in described.values.items():
        member = object.__new__(made)
        member.name, member.value = key, value
        made._members[key] = member
    return made


_ITEM_SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1, "FP8": 1, "INT4": 0.5}


def fake_tensorrt(surface: Surface, gpus: Gpus) -> Any:
    """The module `tensorrt` or `tensorrt_rtx` of a version, on these GPUs."""
    return FakeTensorRT(surface, gpus)
