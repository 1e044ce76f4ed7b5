# Two ways to install:
#   cmake --install BUILD --component python --prefix SITE_PACKAGES   the Python package's binaries
#   cmake --install BUILD --prefix PREFIX                             for C++ programs, with find_package(x_rope_cls)

set(package_dir x_rope_cls) # of the Python package
set(python_libraries x_rope_cls_kernels)
set_target_properties(x_rope_cls_kernels PROPERTIES INSTALL_RPATH "${origin}")
set(operator_libraries)
if(X_ROPE_CLS_TORCH)
  list(APPEND operator_libraries x_rope_cls)
  if(TARGET x_rope_cls_cuda)
    list(APPEND operator_libraries x_rope_cls_cuda)
  endif()
  list(APPEND python_libraries ${operator_libraries})
  # BUILD_RPATH too: otherwise the build tree's library would record the folder of torch.
  set_target_properties(${operator_libraries} PROPERTIES
    SKIP_BUILD_RPATH ON BUILD_RPATH "${origin}" INSTALL_RPATH "${origin}")
endif()
install(TARGETS ${python_libraries}
  LIBRARY DESTINATION ${package_dir}/lib COMPONENT python EXCLUDE_FROM_ALL)
if(X_ROPE_CLS_PYTHON)
  set_target_properties(_C PROPERTIES INSTALL_RPATH "${origin}/lib")
  install(TARGETS _C LIBRARY DESTINATION ${package_dir} COMPONENT python EXCLUDE_FROM_ALL)
endif()

if(X_ROPE_CLS_TORCH)
  include(CMakePackageConfigHelpers)
  set(config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/x_rope_cls")
  set(config_out "${CMAKE_CURRENT_BINARY_DIR}/generated")
  install(TARGETS ${operator_libraries} x_rope_cls_kernels EXPORT x_rope_cls_targets
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT cpp)
  # A program uses no symbol of the library: loading it registers the operators. Keep the linker from
  # dropping it.
  if(NOT APPLE)
    foreach(library IN LISTS operator_libraries)
      target_link_options(${library} INTERFACE LINKER:--no-as-needed)
    endforeach()
  endif()
  install(EXPORT x_rope_cls_targets NAMESPACE x_rope_cls:: FILE x_rope_clsTargets.cmake
    DESTINATION "${config_dir}" COMPONENT cpp)
  configure_package_config_file(cmake/x_rope_clsConfig.cmake.in "${config_out}/x_rope_clsConfig.cmake"
    INSTALL_DESTINATION "${config_dir}")
  write_basic_package_version_file("${config_out}/x_rope_clsConfigVersion.cmake"
    COMPATIBILITY SameMinorVersion)
  install(FILES
    "${config_out}/x_rope_clsConfig.cmake" "${config_out}/x_rope_clsConfigVersion.cmake"
    DESTINATION "${config_dir}" COMPONENT cpp)
endif()
