# Python_EXECUTABLE, and what a Python module needs where one is built.

set(python_components Interpreter)
if(X_ROPE_CLS_PYTHON)
  list(APPEND python_components Development.Module)
endif()
set(Python_FIND_VIRTUALENV FIRST)
find_package(Python 3.10 REQUIRED COMPONENTS ${python_components})
