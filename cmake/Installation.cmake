# Two ways to install:
#   cmake --install BUILD --component python --prefix SITE_PACKAGES   the Python package's binaries
#   cmake --install BUILD --prefix PREFIX                             for C++ programs, with find_package(x_rope_cls)

set(package_dir x_rope_cls) # of the Python package
set(python_libraries x_rope_cls_kernels)
set_target_properties(x_rope_cls_kernels PROPERTIES INSTALL_RPATH "${origin}")
if(X_ROPE_CLS_TORCH)
  list(APPEND python_libraries x_rope_cls)
  # BUILD_RPATH too: otherwise the build tree's library would record the folder of torch.
  set_target_properties(x_rope_cls PROPERTIES
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
  install(TARGETS x_rope_cls x_rope_cls_kernels EXPORT x_rope_cls_targets
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT cpp)
  # A program uses no symbol of the library: loading it registers the operators. Keep the linker from
  # dropping it.
  if(NOT APPLE)
    target_link_options(x_rope_cls INTERFACE LINKER:--no-as-needed)
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
