// What Python's calls past the dispatcher share: python.cpp says what they are.
#pragma once

#include <Python.h>

#include <exception>
#include <string>

#include "../strides.h"
#include "kernels.h"

namespace mlora {

// What of DLPack, version 1, tells what a tensor is without making another object (its C exchange API).
namespace dlpack {
struct Tensor {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Api {
  uint32_t major, minor;
  Api* older;
  int (*allocate)(void*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*tensor_from_object)(void*, Tensor*);
  int (*stream)(int32_t, int32_t, void**);
};
constexpr char kName[] = "dlpack_exchange_api";
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloatCode = 2, kBfloatCode = 4;
}  // namespace dlpack

extern const dlpack::Api* api;  // torch's
extern PyTypeObject* tensor_type;

// What `object` is, if it is a tensor on the CPU with memory; of a type that DLPack knows.
inline bool tensor_in(PyObject* object, dlpack::Tensor* t) {
  if (!PyObject_TypeCheck(object, tensor_type)) return false;
  if (api->tensor_from_object(object, t)) {  // one that has no memory, or none that DLPack knows
    PyErr_Clear();
    return false;
  }
  return t->device_type == dlpack::kCpu;
}

inline bool has_type(const dlpack::Tensor& t, Type type) {
  const uint8_t code = type == kBFloat16 ? dlpack::kBfloatCode : dlpack::kFloatCode;
  return t.dtype.code == code && t.dtype.bits == (type == kFloat ? 32 : 16) && t.dtype.lanes == 1;
}

inline char* data_of(const dlpack::Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// What a tensor is, as rows of its last dimension. Of its memory nothing is read.
struct Rows {
  char* data;
  int64_t rows, width, stride;  // of rows
};

// Whether `object` is a tensor on the CPU of this type whose rows are contiguous and at one distance.
inline bool rows_in(PyObject* object, Type type, Rows* to) {
  dlpack::Tensor t;
  if (!tensor_in(object, &t) || !has_type(t, type) || t.dims < 1) return false;
  const int32_t last = t.dims - 1;
  *to = {data_of(t), 1, t.shape[last], 0};
  if (!evenly_spaced(t.shape, t.strides, t.dims, &to->stride)) return false;
  for (int32_t d = 0; d < last; ++d) to->rows *= t.shape[d];
  return true;
}

// Runs f without the interpreter's lock; what it throws becomes a RuntimeError.
template <class F>
PyObject* run(const F& f) {
  std::string error;
  PyThreadState* state = PyEval_SaveThread();
  try {
    f();
  } catch (const std::exception& e) {
    error = e.what();
  }
  PyEval_RestoreThread(state);
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  return PyBool_FromLong(1);
}

inline bool counts(Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments, must be %zd", given, wanted);
  return false;
}

// In pointwise.cpp.
PyObject* rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* rotate(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* gate(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace mlora
