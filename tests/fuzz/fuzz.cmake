# SPDX-License-Identifier: MIT
# rvqkv_add_fuzz_targets(): for every fuzz_X.cpp here
#   fuzz_X_replay   a plain program, and the test fuzz.X that runs it over its seeds and damage to them;
#   fuzz_X          with libFuzzer and sanitizers, when RVQKV_FUZZ is on (Clang). Start it so:
#                     fuzz_X_replay --seeds corpus && fuzz_X corpus -max_total_time=120

function(rvqkv_add_fuzz_targets)
  set(folder "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
  file(GLOB sources CONFIGURE_DEPENDS "${folder}/fuzz_*.cpp")
  foreach(source IN LISTS sources)
    cmake_path(GET source STEM name)
    string(REGEX REPLACE "^fuzz_" "" subject "${name}")
    add_executable(${name}_replay "${source}" "${folder}/replay.cpp")
    add_test(NAME fuzz.${subject} COMMAND ${name}_replay)
    set_tests_properties(fuzz.${subject} PROPERTIES TIMEOUT 600)
    set(programs ${name}_replay)
    if(RVQKV_FUZZ)
      add_executable(${name} "${source}")
      target_compile_options(${name} PRIVATE -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
      target_link_options(${name} PRIVATE -fsanitize=fuzzer,address,undefined)
      list(APPEND programs ${name})
    endif()
    foreach(program IN LISTS programs)
      target_include_directories(${program} PRIVATE "${folder}" "${folder}/..")
      target_link_libraries(${program} PRIVATE rvqkv_kernels rvqkv::files)
    endforeach()
  endforeach()
endfunction()
