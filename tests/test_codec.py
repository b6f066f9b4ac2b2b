"""`JsonCodec`: what goes in comes out again, or is refused with the message and the path, before it is written."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, Optional
from uuid import UUID, uuid4

import msgspec
import orjson
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Codec, CodecError, JsonCodec, Message

NAN, INFINITY = float("nan"), float("inf")
BORN = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


class Status(enum.Enum):
    OPEN = "open"
    PAID = "paid"


class Level(enum.IntEnum):
    LOW = 1


class Colour(enum.StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Line:
    article: str
    price: float


@dataclass(frozen=True)
class Order:
    number: int
    lines: list[Line]


def error_of(payload: Any, codec: Codec | None = None) -> str:
    """What the error says when this payload is written."""
    with pytest.raises(CodecError) as caught:
        (codec or JsonCodec()).encode(payload)
    return str(caught.value)


def through(codec: Codec, payload: Any) -> Any:
    """The payload after a round trip."""
    name, body = codec.encode(payload)
    return codec.decode(body, name)


# --- any JSON value -------------------------------------------------------------------------------------

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)


@given(JSON)
def test_any_json_value_comes_back_the_same_in_value_type_and_order(value: Any) -> None:
    # repr tells 1 from 1.0 and from True, 0.0 from -0.0, and shows the order of a dict.
    assert repr(through(JsonCodec(), value)) == repr(value)


@given(JSON)
def test_the_body_is_the_shortest_json_in_utf_8_and_has_no_type_name(value: Any) -> None:
    name, body = JsonCodec().encode(value)
    assert name is None
    assert body == orjson.dumps(value)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**64 - 1, 5e-324, 1.7976931348623157e308, -0.0, 0.1])
def test_numbers_at_the_edge_come_back_exactly(number: float) -> None:
    assert repr(through(JsonCodec(), number)) == repr(number)


def test_a_deep_payload_comes_back() -> None:
    deep: Any = None
    for _ in range(200):
        deep = {"next": [deep]} if deep is None else [deep]
    assert through(JsonCodec(), deep) == deep


# --- what has no JSON form ------------------------------------------------------------------------------

UNSPEAKABLE = [
    (b"x", "$", "bytes"),
    ({"a": [1, {"b": b"x"}]}, "$['a'][1]['b']", "bytes"),
    ([0, (1, {2})], "$[1][1]", "set"),
    ({"price": Decimal("1.50")}, "$['price']", "Decimal"),
    ({"big": 2**70}, "$['big']", "int"),
    ({"big": -(2**63) - 1}, "$['big']", "int"),
    ({"a": {"b": {1: "x"}}}, "$['a']['b']", "dict"),
    ({"a": {None: "x"}}, "$['a']", "dict"),
    ({"it's": {"a.b[0]": 1j}}, """$["it's"]['a.b[0]']""", "complex"),
    (Order(1, [Line("a", 1.5), Line("b", Decimal(2))]), "$.lines[1].price", "Decimal"),  # type: ignore[arg-type]
    ({"order": Order(1, [Line("a", 1.5), object()])}, "$['order'].lines[1]", "object"),  # type: ignore[list-item]
    ({"wait": timedelta(1)}, "$['wait']", "timedelta"),
    ({"f": print}, "$['f']", "builtin_function_or_method"),
    ({"class": Order}, "$['class']", "type"),
    ({"text": "\ud800"}, "$['text']", "str"),
    ({"a": {"\ud800": 1}}, "$['a']", "dict"),
    ([{"message": Message(1, topic="t")}], "$[0]['message']", "Message"),
    ({"a.b" * 120: {"c": b"x"}}, f"$[{'a.b' * 120!r}]['c']", "bytes"),
]


@pytest.mark.parametrize(("payload", "path", "kind"), UNSPEAKABLE, ids=[path for _, path, _ in UNSPEAKABLE])
def test_a_payload_without_a_json_form_is_refused_with_the_message_and_the_path(
    payload: Any, path: str, kind: str
) -> None:
    message = Message(payload, topic="t")
    with pytest.raises(CodecError) as caught:
        _ = message.body
    assert str(caught.value).startswith(f"message {message.id}: {path} ({kind}) has no JSON form: ")
    assert caught.value.__cause__ is not None
    str(caught.value).encode()  # an error must be printable, whatever it speaks of


@dataclass
class Measured:
    value: Any


class Model(pydantic.BaseModel):
    value: float


class Struct(msgspec.Struct):
    value: float


class Limit(enum.Enum):
    NONE = INFINITY


class Unknown:
    """What only a `default` can make something of."""


NOT_FINITE = [
    (NAN, "$"),
    (-INFINITY, "$"),
    ({"a": [1.0, None, {"b": INFINITY}]}, "$['a'][2]['b']"),
    ((None, NAN), "$[1]"),
    (Measured([NAN]), "$.value[0]"),
    ({"m": Measured(NAN)}, "$['m'].value"),
    (Limit.NONE, "$"),
    ({"limit": Limit.NONE}, "$['limit']"),
    (Model(value=NAN), "$"),
    ([Model(value=INFINITY)], "$[0]"),
    (Struct(NAN), "$"),
    ({"s": Struct(INFINITY)}, "$['s']"),
]


@pytest.mark.parametrize(("payload", "path"), NOT_FINITE, ids=[repr(payload) for payload, _ in NOT_FINITE])
def test_a_number_that_is_not_finite_is_refused_with_the_message_and_the_path(payload: Any, path: str) -> None:
    message = Message(payload, topic="t")
    with pytest.raises(CodecError) as caught:
        _ = message.body
    assert str(caught.value).startswith(f"message {message.id}: {path}")
    assert "NaN" in str(caught.value)


def test_a_number_that_is_not_finite_is_refused_also_where_a_default_made_it() -> None:
    assert "NaN" in error_of({"u": Unknown()}, JsonCodec(default=lambda _: NAN))


@pytest.mark.parametrize("value", [None, [None, 1.5], {"null": None, "a": "null"}, [1e308, None]], ids=repr)
def test_null_is_no_sign_of_nan(value: Any) -> None:
    assert through(JsonCodec(), value) == value


def a_list_that_holds_itself() -> Any:
    payload: list[Any] = [1]
    payload.append({"again": payload})
    return payload


def a_dataclass_that_holds_itself() -> Any:
    payload = Measured(None)
    payload.value = payload
    return payload


def nested(depth: int, inner: Any = 0) -> Any:
    payload = inner
    for _ in range(depth):
        payload = [payload]
    return payload


@pytest.mark.parametrize(
    "make",
    [a_list_that_holds_itself, a_dataclass_that_holds_itself, lambda: nested(300), lambda: nested(50_000)],
    ids=["list in itself", "dataclass in itself", "300 deep", "50,000 deep"],
)
def test_what_is_nested_too_deeply_or_holds_itself_is_refused_in_a_short_text(make: Callable[[], Any]) -> None:
    text = error_of(make())
    assert "nested too deeply" in text or "Recursion limit reached" in text
    assert len(text) < 1000


def test_a_wide_payload_that_holds_itself_is_refused_at_once() -> None:
    payload: list[Any] = []
    payload += [payload] * 20
    assert "nested too deeply" in error_of(payload)


def test_the_error_does_not_show_the_payload() -> None:
    assert "4111" not in error_of({"card": "4111-1111", "raw": [b"4111", {"4111"}, 1]})


def test_the_error_of_a_default_is_the_cause() -> None:
    def default(value: Any) -> Any:
        raise LookupError(f"no idea what {type(value).__name__} is")

    with pytest.raises(CodecError, match=r"\$\['u'\] \(Unknown\)") as caught:
        JsonCodec(default=default).encode({"u": Unknown()})
    causes = [caught.value.__cause__, getattr(caught.value.__cause__, "__cause__", None)]
    assert any(isinstance(cause, LookupError) for cause in causes)


# --- options --------------------------------------------------------------------------------------------


def test_options_are_orjsons() -> None:
    assert JsonCodec(options=orjson.OPT_SORT_KEYS).encode({"b": 1, "a": 2}) == (None, b'{"a":2,"b":1}')
    assert JsonCodec(options=orjson.OPT_NON_STR_KEYS).encode({1: 2}) == (None, b'{"1":2}')


def test_a_default_says_what_to_do_with_what_orjson_does_not_know() -> None:
    codec = JsonCodec(default=str)
    assert through(codec, {"price": Decimal("1.50")}) == {"price": "1.50"}


# --- mapped types ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    text: str
    number: int
    ratio: float
    flag: bool
    nothing: None
    anything: Any
    identity: UUID
    moment: datetime
    day: date
    hour: time
    status: Status
    level: Level
    colour: Colour
    kind: Literal["a", "b"]
    bounded: Annotated[int, "positive"]
    maybe: str | None
    maybe_moment: Optional[datetime]  # noqa: UP045 -- the old spelling is still everywhere
    maybe_line: Line | None
    line: Line
    lines: list[Line]
    row: tuple[Line, ...]
    pair: tuple[int, Line]
    plain_list: list  # type: ignore[type-arg]  # the point
    plain_dict: dict  # type: ignore[type-arg]  # the point
    by_name: dict[str, Line]
    mapping: Mapping[str, UUID]
    nested: dict[str, list[Line | None]]
    number_or_text: int | str
    with_default: int = 3


EVERYTHING = Everything(
    text="é",
    number=2**53,
    ratio=2.0,
    flag=True,
    nothing=None,
    anything={"a": [1, None]},
    identity=UUID(int=1),
    moment=BORN,
    day=BORN.date(),
    hour=time(1, 2, 3),
    status=Status.PAID,
    level=Level.LOW,
    colour=Colour.RED,
    kind="b",
    bounded=1,
    maybe=None,
    maybe_moment=BORN,
    maybe_line=Line("a", 1.5),
    line=Line("b", 2.0),
    lines=[Line("c", 3.0), Line("d", 4.0)],
    row=(Line("e", 5.0),),
    pair=(1, Line("f", 6.0)),
    plain_list=[1, "x"],
    plain_dict={"k": None},
    by_name={"g": Line("g", 7.0)},
    mapping={"u": UUID(int=2)},
    nested={"h": [None, Line("h", 8.0)]},
    number_or_text="9",
)


def test_a_dataclass_comes_back_as_itself_with_every_type_it_may_hold() -> None:
    codec = JsonCodec(types={"everything": Everything})
    name, body = codec.encode(EVERYTHING)
    assert name == "everything"
    assert codec.decode(body, name) == EVERYTHING


def test_a_float_field_is_a_float_also_where_json_says_an_integer() -> None:
    decoded = JsonCodec(types={"line": Line}).decode(b'{"article": "a", "price": 2}', "line")
    assert type(decoded.price) is float


@dataclass
class Reading:
    value: int | float | None  # what JSON calls a number, and what people write for it


@pytest.mark.parametrize("value", [1, 1.5, None])
def test_a_field_that_takes_any_number_of_json_comes_back(value: float | None) -> None:
    assert through(JsonCodec(types={"reading": Reading}), Reading(value)) == Reading(value)


@dataclass
class Node:
    name: str
    children: list["Node"] = field(default_factory=list)


def test_a_dataclass_that_refers_to_itself_comes_back() -> None:
    codec = JsonCodec(types={"node": Node})
    tree = Node("root", [Node("left"), Node("right", [Node("leaf")])])
    assert through(codec, tree) == tree


@dataclass
class Tags:
    names: set[str]
    pinned: frozenset[int]


def test_sets_in_a_dataclass_come_back_when_a_default_makes_lists_of_them() -> None:
    codec = JsonCodec(types={"tags": Tags}, default=list)
    assert through(codec, Tags({"a", "b"}, frozenset({1}))) == Tags({"a", "b"}, frozenset({1}))


@dataclass
class Stock:
    amounts: dict[UUID, int]


def test_the_keys_of_a_mapped_dict_come_back_in_their_type() -> None:
    codec = JsonCodec(types={"stock": Stock}, options=orjson.OPT_NON_STR_KEYS)
    stock = Stock({uuid4(): 1, uuid4(): 2})
    assert through(codec, stock) == stock


@dataclass
class Computed:
    width: int
    area: int = field(init=False)

    def __post_init__(self) -> None:
        self.area = self.width**2


def test_a_field_that_the_constructor_computes_is_computed_again() -> None:
    assert through(JsonCodec(types={"computed": Computed}), Computed(3)) == Computed(3)


@dataclass
class NotComputed:
    name: bytes
    area: int = field(init=False)


def test_a_dataclass_with_a_field_never_set_is_refused_like_any_other() -> None:
    assert error_of({"it": NotComputed(b"x")}).startswith("$['it']")


class Strict(pydantic.BaseModel, strict=True, frozen=True):
    identity: UUID
    moment: datetime
    status: Status
    row: tuple[int, ...]


class Aliased(pydantic.BaseModel):
    order_id: int = pydantic.Field(alias="orderId")


class Rich(pydantic.BaseModel):
    price: Decimal
    tags: set[str]
    by_number: dict[int, str]
    lines: list[Line]
    inner: Model
    maybe: Model | None = None


class Whole(pydantic.RootModel[list[int]]):
    pass


@pytest.mark.parametrize(
    "model",
    [
        Rich(price=Decimal("1.50"), tags={"a"}, by_number={1: "x"}, lines=[Line("a", 1.5)], inner=Model(value=1)),
        Strict(identity=UUID(int=1), moment=BORN, status=Status.OPEN, row=(1, 2)),
        Aliased(orderId=7),
        Whole([1, 2]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_pydantic_model_comes_back_as_itself(model: pydantic.BaseModel) -> None:
    assert through(JsonCodec(types={"model": type(model)}), model) == model


class Inner(msgspec.Struct, frozen=True):
    price: Decimal
    raw: bytes


class Renamed(msgspec.Struct, rename="camel"):
    order_id: int
    made_at: datetime
    inner: Inner
    tags: set[str]
    maybe: Inner | None = None


class Compact(msgspec.Struct, array_like=True):
    x: int
    y: int


class Cat(msgspec.Struct, tag=True):
    lives: int


class Keyed(msgspec.Struct):
    by_number: dict[int, str]


@pytest.mark.parametrize(
    "struct",
    [Renamed(7, BORN, Inner(Decimal("1.50"), b"\0\xff"), {"a"}), Compact(1, 2), Cat(9), Keyed({1: "x"})],
    ids=lambda struct: type(struct).__name__,
)
def test_a_msgspec_struct_comes_back_as_itself(struct: msgspec.Struct) -> None:
    assert through(JsonCodec(types={"struct": type(struct)}), struct) == struct


@dataclass
class Mixed:
    model: Model
    struct: Compact


def test_models_and_structs_come_back_inside_of_a_dataclass() -> None:
    mixed = Mixed(Model(value=1.5), Compact(1, 2))
    assert through(JsonCodec(types={"mixed": Mixed}), mixed) == mixed


@pytest.mark.parametrize("payload", [Line("a", 1.5), Model(value=1.5), Compact(1, 2)], ids=repr)
def test_what_is_not_mapped_has_no_name_and_comes_back_plain(payload: Any) -> None:
    name, body = JsonCodec().encode(payload)
    assert name is None
    assert JsonCodec().decode(body, name) in ({"article": "a", "price": 1.5}, {"value": 1.5}, [1, 2])


def test_a_name_that_is_not_known_stays_plain() -> None:
    _, body = JsonCodec(types={"line": Line}).encode(Line("a", 1.5))
    assert JsonCodec().decode(body, "line") == {"article": "a", "price": 1.5}


def test_no_class_is_ever_found_by_its_path() -> None:
    for path in ("builtins.dict", "subprocess.Popen", "tests.test_codec.Line", f"{__name__}.Line"):
        assert JsonCodec(types={"line": Line}).decode(b'{"a": 1}', path) == {"a": 1}


def test_of_several_names_for_one_type_the_first_is_written_and_all_are_read() -> None:
    codec = JsonCodec(types={"orders.line": Line, "line": Line})
    name, body = codec.encode(Line("a", 1.5))
    assert name == "orders.line"
    assert codec.decode(body, "line") == codec.decode(body, "orders.line") == Line("a", 1.5)


def test_a_subclass_of_a_mapped_type_is_another_type() -> None:
    @dataclass(frozen=True)
    class Special(Line):
        pass

    assert JsonCodec(types={"line": Line}).encode(Special("a", 1.5))[0] is None


def test_a_field_from_a_newer_version_of_the_type_is_left_aside() -> None:
    codec = JsonCodec(types={"line": Line})
    assert codec.decode(b'{"article": "a", "price": 1.5, "since": 2031}', "line") == Line("a", 1.5)


def test_the_types_one_has_given_can_be_changed_without_changing_the_codec() -> None:
    types: dict[str, type] = {"line": Line}
    codec = JsonCodec(types=types)
    types["order"] = Order
    assert codec.encode(Order(1, []))[0] is None


# --- upcasters ------------------------------------------------------------------------------------------


def test_an_upcaster_makes_of_an_old_document_what_its_type_expects_today() -> None:
    codec = JsonCodec(
        types={"line": Line, "line.v1": Line},
        upcasters={"line.v1": lambda old: {"article": old["name"], "price": old["cents"] / 100}},
    )
    assert codec.decode(b'{"name": "a", "cents": 150}', "line.v1") == Line("a", 1.5)
    assert codec.decode(b'{"article": "a", "price": 1.5}', "line") == Line("a", 1.5)


def test_an_upcaster_works_for_a_name_without_a_type() -> None:
    codec = JsonCodec(upcasters={"counted": lambda document: document["n"] + 1})
    assert codec.decode(b'{"n": 1}', "counted") == 2


def test_an_upcaster_is_never_asked_about_what_has_no_name() -> None:
    codec = JsonCodec(upcasters={"counted": lambda _: 1 / 0})
    assert codec.decode(b'{"n": 1}', None) == {"n": 1}


def test_an_upcaster_that_fails_is_a_codec_error_that_names_the_type() -> None:
    codec = JsonCodec(upcasters={"counted": lambda document: document["n"]})
    with pytest.raises(CodecError, match="'counted'") as caught:
        codec.decode(b"{}", "counted")
    assert isinstance(caught.value.__cause__, KeyError)


# --- what cannot be decoded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"{} {}", b"NaN", b"'a'", b'"\xed\xa0\x80"', b"[" * 5000], ids=repr
)
def test_a_body_that_is_no_json_is_a_codec_error(body: bytes) -> None:
    with pytest.raises(CodecError, match="the body is not JSON"):
        JsonCodec().decode(body, None)


@dataclass
class Parcel:
    status: Status
    moment: datetime
    identity: UUID
    names: list[str]
    by_name: dict[str, int]
    pair: tuple[int, int]
    line: Line | None = None


PARCEL: dict[str, Any] = {
    "status": "open",
    "moment": "2031-05-06T07:08:09Z",
    "identity": str(UUID(int=1)),
    "names": ["a"],
    "by_name": {"a": 1},
    "pair": [1, 2],
}


def test_a_parcel_as_it_should_be_is_decoded() -> None:
    decoded = JsonCodec(types={"parcel": Parcel}).decode(orjson.dumps(PARCEL), "parcel")
    assert decoded.names == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        {"status": "lost"},
        {"moment": "yesterday"},
        {"moment": 5},
        {"identity": "1"},
        {"names": None},
        {"names": 5},
        {"names": "abc"},
        {"names": {"a": 1}},
        {"by_name": [1]},
        {"pair": [1, 2, 3]},
        {"pair": "12"},
        {"line": {"article": "a"}},
        {"line": "a"},
    ],
    ids=str,
)
def test_a_document_that_does_not_fit_its_dataclass_is_a_codec_error_that_names_the_type(
    change: dict[str, Any],
) -> None:
    codec = JsonCodec(types={"parcel": Parcel})
    with pytest.raises(CodecError, match="'parcel'"):
        codec.decode(orjson.dumps(PARCEL | change), "parcel")


@pytest.mark.parametrize("document", [b"[]", b"null", b"5", b'"x"', b"{}"], ids=repr)
@pytest.mark.parametrize("cls", [Parcel, Model, Struct], ids=["dataclass", "pydantic", "msgspec"])
def test_a_document_of_another_shape_is_a_codec_error_that_names_the_type(cls: type, document: bytes) -> None:
    with pytest.raises(CodecError, match="'mapped'"):
        JsonCodec(types={"mapped": cls}).decode(document, "mapped")


class Arbitrary:
    pass


UNMAPPABLE = [
    Arbitrary,
    Decimal,
    make_dataclass("WithBytes", [("a", bytes)]),
    make_dataclass("WithDecimal", [("a", list[Decimal])]),
    make_dataclass("WithChoice", [("a", Line | Order)]),
    make_dataclass("WithArbitrary", [("a", dict[str, Arbitrary])]),
    make_dataclass("WithUnknownName", [("a", "NoSuchName")]),
    "Line",
]


@pytest.mark.parametrize("cls", UNMAPPABLE, ids=lambda cls: getattr(cls, "__name__", cls))
def test_a_type_that_could_not_be_decoded_is_refused_when_it_is_mapped(cls: Any) -> None:
    with pytest.raises(CodecError) as caught:
        JsonCodec(types={"a": cls})
    assert str(caught.value)


def test_the_refusal_of_a_type_says_what_to_map_instead() -> None:
    with pytest.raises(CodecError, match=r"cannot decode into Decimal: map .* or a pydantic model or msgspec Struct"):
        JsonCodec(types={"price": Decimal})
