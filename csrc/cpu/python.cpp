// Calls from Python past torch's dispatcher, which takes longer than the kernels for a few tokens: 2 us a call in a loop,
// 5 between the products of a model, by when little of its code is left in the caches. mlora/ops/direct.py says when
// these calls may stand in for the operators.
#include "python.h"

#include "ops.h"

// Of OpenMP 5, where torch's threads are OpenMP's: in one of the libraries that torch itself needs.
extern "C" int omp_pause_resource_all(int kind) __attribute__((weak));

namespace mlora {

const dlpack::Api* api = nullptr;
PyTypeObject* tensor_type = nullptr;

namespace {

constexpr char kLayer[] = "mlora.layer";

// A linear that the adapters of a store change: its shape, and where they are.
struct Layer {
  Routing routing;
  int64_t in, out;
  Types types;
};

bool dense(const Rows& t) { return t.rows <= 1 || t.stride == t.width; }

enum Found { kNo, kYes, kError };

PyObject* refused(Found found) { return found == kError ? nullptr : PyBool_FromLong(0); }

// The layer, the plan, y and x, with which both calls begin.
Found begin(PyObject* const* args, Routing* routing, Problem* p, Types* types) {
  const Layer* layer = static_cast<const Layer*>(PyCapsule_GetPointer(args[0], kLayer));
  char* words;
  Py_ssize_t bytes;
  if (!layer || PyBytes_AsStringAndSize(args[1], &words, &bytes)) return kError;
  *types = layer->types;
  *routing = layer->routing;
  routing->plan = reinterpret_cast<const int32_t*>(words);
  routing->words = bytes / static_cast<Py_ssize_t>(sizeof(int32_t));
  Rows x, y;
  const Type type = rows_type(*types);
  if (!rows_in(args[2], type, &y) || !rows_in(args[3], type, &x) || x.width != layer->in || y.width != layer->out ||
      x.rows != y.rows) {
    return kNo;
  }
  *p = {};
  p->x = x.data;
  p->y = y.data;
  p->in = x.width;
  p->out = y.width;
  p->x_stride = x.stride;
  p->y_stride = y.stride;
  p->tokens = x.rows;
  p->itemsize = routing->itemsize;
  return kYes;
}

PyObject* exchange(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!counts(count, 2)) return nullptr;
  if (!PyType_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "no type");
    return nullptr;
  }
  const dlpack::Api* found = nullptr;
  if (args[0] != Py_None) {
    found = static_cast<const dlpack::Api*>(PyCapsule_GetPointer(args[0], dlpack::kName));
    if (!found) return nullptr;
  }
  while (found && found->major != 1) found = found->older;
  Py_INCREF(args[1]);
  tensor_type = reinterpret_cast<PyTypeObject*>(args[1]);
  api = found && found->tensor_from_object ? found : nullptr;
  return PyBool_FromLong(api != nullptr);
}

void drop(PyObject* capsule) { delete static_cast<Layer*>(PyCapsule_GetPointer(capsule, kLayer)); }

PyObject* layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!counts(count, 7)) return nullptr;
  int64_t v[7];
  for (int i = 0; i < 7; ++i) {
    v[i] = PyLong_AsLongLong(args[i]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  if (v[2] < 0 || v[2] >= kTypesCount) {
    PyErr_Format(PyExc_ValueError, "no types %d", static_cast<int>(v[2]));
    return nullptr;
  }
  const Types types = static_cast<Types>(v[2]);
  const int64_t itemsize = types == kHalves || types == kBFloats ? 2 : 4;
  const Routing routing = {
      reinterpret_cast<const char*>(v[0]), v[1], itemsize, reinterpret_cast<const int64_t*>(v[3]), v[4], nullptr, 0};
  return PyCapsule_New(new Layer{routing, v[5], v[6], types}, kLayer, drop);
}

PyObject* apply(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!counts(count, 4)) return nullptr;
  Routing routing;
  Problem p;
  Types types;
  const Found found = begin(args, &routing, &p, &types);
  if (found != kYes) return refused(found);
  return run([&] { apply_rows(routing, p, types); });
}

PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!counts(count, 7)) return nullptr;
  Routing routing;
  Problem p;
  Types types;
  const Found found = begin(args, &routing, &p, &types);
  if (found != kYes) return refused(found);
  const Type type = rows_type(types);
  Rows weight, bias = {};
  if (!rows_in(args[4], type, &weight) || weight.rows != p.out || weight.width != p.in || !dense(weight)) {
    return refused(kNo);
  }
  if (args[5] != Py_None && (!rows_in(args[5], type, &bias) || bias.rows != 1 || bias.width != p.out)) {
    return refused(kNo);
  }
  p.kblock = PyLong_AsLongLong(args[6]);
  if (p.kblock == -1 && PyErr_Occurred()) return nullptr;
  p.weight = weight.data;
  p.bias = bias.data;
  return run([&] { linear_rows(routing, p, types); });
}

PyObject* release_threads(PyObject*, PyObject* const*, Py_ssize_t count) {
  constexpr int kSoft = 1;  // settings stay
  if (!counts(count, 0)) return nullptr;
  return PyBool_FromLong(omp_pause_resource_all && omp_pause_resource_all(kSoft) == 0);
}

template <PyObject* (*F)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(F)), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    method<exchange>("exchange", "exchange(torch.Tensor.__dlpack_c_exchange_api__ or None, torch.Tensor) -> whether it will do"),
    method<layer>("layer", "layer(arena, elements, types, table, slots, in_features, out_features) -> layer"),
    method<apply>("apply", "apply(layer, plan, y, x) -> whether it was done"),
    method<linear>("linear", "linear(layer, plan, y, x, weight, bias, kblock) -> whether it was done"),
    method<rms_norm>("rms_norm", "rms_norm(y, x, weight, eps) -> whether it was done"),
    method<rotate>("rotate", "rotate(y, x, cos, sin) -> whether it was done"),
    method<gate>("gate", "gate(y, gate, up) -> whether it was done"),
    method<release_threads>("release_threads", "release_threads() -> whether it was done"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace mlora

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&mlora::module); }
