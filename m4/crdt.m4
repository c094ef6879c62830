dnl Where a dependency is missing, say which Debian package has it.

dnl CRDT_NEED_PKG(VARIABLE, pkg-config module, Debian package)
AC_DEFUN([CRDT_NEED_PKG], [
  PKG_CHECK_MODULES([$1], [$2], [],
    [AC_MSG_ERROR([$2 not found. On Debian: apt-get install $3])])
])

dnl CRDT_NEED_LIB(VARIABLE, library, function, header, Debian package): for
dnl libraries that ship no usable .pc file.
AC_DEFUN([CRDT_NEED_LIB], [
  AC_CHECK_HEADER([$4], [],
    [AC_MSG_ERROR([$4 not found. On Debian: apt-get install $5])])
  AC_CHECK_LIB([$2], [$3], [$1_LIBS="-l$2"],
    [AC_MSG_ERROR([lib$2 not found. On Debian: apt-get install $5])])
  AC_SUBST([$1_LIBS])
])

dnl The include and link flags of the installed Dovecot, from its dovecot-config.
AC_DEFUN([CRDT_DOVECOT], [
  AC_ARG_WITH([dovecot],
    [AS_HELP_STRING([--with-dovecot=DIR],
      [directory of dovecot-config (/usr/lib/dovecot); --without-dovecot builds only the storage daemon])],
    [], [with_dovecot=/usr/lib/dovecot])
  AC_ARG_WITH([moduledir],
    [AS_HELP_STRING([--with-moduledir=DIR], [where Dovecot plugins go (Dovecot's own module directory)])])
  AS_IF([test "x$with_dovecot" != xno], [
    AC_MSG_CHECKING([for Dovecot's development files])
    AS_IF([test -f "$with_dovecot/dovecot-config"], [],
      [AC_MSG_RESULT([no])
       AC_MSG_ERROR([$with_dovecot/dovecot-config not found. On Debian: apt-get install dovecot-dev (or give --with-dovecot=DIR, or --without-dovecot for the storage daemon alone)])])
    AC_MSG_RESULT([$with_dovecot])
    eval `grep '^dovecot_@<:@a-z_@:>@*=' "$with_dovecot/dovecot-config"`
    eval `grep '^LIBDOVECOT@<:@A-Z0-9_@:>@*=' "$with_dovecot/dovecot-config"`
    AC_MSG_CHECKING([which Dovecot this is])
    crdt_dovecot=`sed -n 's/^#define DOVECOT_ABI_VERSION "\(@<:@0-9@:>@*\.@<:@0-9@:>@*\).*/\1/p' "$dovecot_pkgincludedir/config.h"`
    AC_MSG_RESULT([${crdt_dovecot:-unknown}])
    AS_CASE([$crdt_dovecot], [2.3|2.4], [],
      [AC_MSG_ERROR([only Dovecot 2.3 and 2.4 are supported])])
    dnl System headers: their warnings are not ours.
    DOVECOT_CPPFLAGS="-isystem $dovecot_pkgincludedir"
    DOVECOT_LIBS="$LIBDOVECOT -Wl,-rpath,$dovecot_pkglibdir"
    DOVECOT_STORAGE_LIBS="$LIBDOVECOT_STORAGE $DOVECOT_LIBS"
  ])
  AS_IF([test -n "$with_moduledir"], [moduledir="$with_moduledir"], [moduledir="$dovecot_moduledir"])
  dnl Services go where Dovecot looks for them, too, unless told otherwise.
  AS_IF([test -z "$with_moduledir" && test "x$libexecdir" = 'x${exec_prefix}/libexec'],
    [dovecotexecdir="$dovecot_pkglibexecdir"], [dovecotexecdir='${libexecdir}/dovecot'])
  AM_CONDITIONAL([WITH_DOVECOT], [test "x$with_dovecot" != xno])
  AM_CONDITIONAL([DOVECOT_24], [test "x$crdt_dovecot" = x2.4])
  AC_SUBST([moduledir])
  AC_SUBST([dovecotexecdir])
  AC_SUBST([DOVECOT_CPPFLAGS])
  AC_SUBST([DOVECOT_LIBS])
  AC_SUBST([DOVECOT_STORAGE_LIBS])
  AC_SUBST([with_dovecot])
])

dnl CRDT_FLAG(VARIABLE, flag): adds a compiler or linker flag that works here.
AC_DEFUN([CRDT_FLAG], [
  AC_MSG_CHECKING([whether $2 works])
  crdt_save_CFLAGS="$CFLAGS"
  CFLAGS="$CFLAGS -Werror $2"
  AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <string.h>]], [[return 0;]])],
    [AC_MSG_RESULT([yes]); $1="$$1 $2"], [AC_MSG_RESULT([no])])
  CFLAGS="$crdt_save_CFLAGS"
])
