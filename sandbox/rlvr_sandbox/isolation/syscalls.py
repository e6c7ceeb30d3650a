"""The system calls that programs may make, with their numbers; whatever is not listed does not exist for them."""

from __future__ import annotations

# Each entry is name:x86_64:aarch64, a dash where the architecture has no such call, by the kernel's uapi headers.
_TABLE = {
    "files": """
        read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
        preadv2:327:286 pwritev2:328:287 open:2:- openat:257:56 creat:85:- close:3:57 close_range:436:436 stat:4:-
        fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 lseek:8:62 access:21:- faccessat:269:48
        faccessat2:439:439 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 fcntl:72:25 flock:73:32 fsync:74:82
        fdatasync:75:83 truncate:76:45 ftruncate:77:46 fallocate:285:47 getdents:78:- getdents64:217:61 getcwd:79:17
        chdir:80:49 fchdir:81:50 rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:-
        link:86:- linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:- symlinkat:266:36 readlink:89:-
        readlinkat:267:78 umask:95:166 sendfile:40:71 copy_file_range:326:285 fadvise64:221:223 statfs:137:43
        fstatfs:138:44 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12
        flistxattr:196:13
    """,
    "attributes": """
        chmod:90:- fchmod:91:52 fchmodat:268:53 utime:132:- utimes:235:- utimensat:280:88 futimesat:261:-
    """,
    "memory": """
        mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 madvise:28:233 msync:26:227 mincore:27:232
        membarrier:324:283
    """,
    "process": """
        exit:60:93 exit_group:231:94 getpid:39:172 gettid:186:178 getppid:110:173 getuid:102:174 geteuid:107:175
        getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgid:121:155
        getpgrp:111:- getsid:124:156 wait4:61:260 waitid:247:95 arch_prctl:158:- set_tid_address:218:96
        set_robust_list:273:99 rseq:334:293 futex:202:98 sched_yield:24:124 sched_getaffinity:204:123
        sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
        sched_get_priority_min:147:126 getcpu:309:168 getrlimit:97:163 setrlimit:160:164 getrusage:98:165
        times:100:153 sysinfo:99:179 uname:63:160 getrandom:318:278 getpriority:140:141 capget:125:90
        restart_syscall:219:128
    """,
    "time": """
        clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115 nanosleep:35:101 gettimeofday:96:169
        time:201:- alarm:37:- setitimer:38:103 getitimer:36:102 timer_create:222:107 timer_settime:223:110
        timer_gettime:224:108 timer_delete:226:111 timer_getoverrun:225:109 timerfd_create:283:85
        timerfd_settime:286:86 timerfd_gettime:287:87
    """,
    "signals": """
        rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigsuspend:130:133 rt_sigpending:127:136
        rt_sigtimedwait:128:137 sigaltstack:131:132 pause:34:- signalfd4:289:74
    """,
    "waiting": """
        select:23:- pselect6:270:72 poll:7:- ppoll:271:73 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
        epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19
    """,
    "sockets": """
        sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockopt:55:209
        setsockopt:54:208 getsockname:51:204 getpeername:52:205
    """,
    "conditional": """
        ioctl:16:29 prctl:157:167 prlimit64:302:261 socketpair:53:199 clone:56:220 kill:62:129 tgkill:234:131
        tkill:200:130
    """,
    "execution": """
        execve:59:221 execveat:322:281 fork:57:- vfork:58:- setpgid:109:154 setsid:112:157
    """,
    "refused": """
        socket:41:198 connect:42:203 bind:49:200 listen:50:201 accept:43:202 accept4:288:242 unshare:272:97
        setns:308:268 mount:165:40 umount2:166:39 pivot_root:155:41 chroot:161:51 ptrace:101:117
        process_vm_readv:310:270 process_vm_writev:311:271 bpf:321:280 perf_event_open:298:241 userfaultfd:323:282
        keyctl:250:219 add_key:248:217 request_key:249:218 open_by_handle_at:304:265 name_to_handle_at:303:264
        init_module:175:105 finit_module:313:273 delete_module:176:106 kexec_load:246:104 reboot:169:142
        swapon:167:224 swapoff:168:225 sethostname:170:161 setdomainname:171:162 mknod:133:- mknodat:259:33 chown:92:-
        fchown:93:55 lchown:94:- fchownat:260:54 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14
        quotactl:179:60 acct:163:89 syslog:103:116 iopl:172:- ioperm:173:- personality:135:92 setuid:105:146
        setgid:106:144 setreuid:113:145 setregid:114:143 setresuid:117:147 setresgid:119:149 setgroups:116:159
        capset:126:91 pidfd_getfd:438:438 pidfd_send_signal:424:424 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240
        shmget:29:194 shmat:30:196 shmctl:31:195 semget:64:190 semop:65:193 semctl:66:191 msgget:68:186 msgsnd:69:189
        msgrcv:70:188 msgctl:71:187 mq_open:240:180 fanotify_init:300:262 vmsplice:278:75 settimeofday:164:170
        clock_settime:227:112 adjtimex:159:171 sched_setaffinity:203:122 setpriority:141:140
    """,
}

_COLUMN = {"x86_64": 1, "aarch64": 2}


def numbers(group: str, machine: str) -> dict[str, int]:
    """The numbers of the calls in ``group`` that ``machine`` has, by name."""
    entries = (entry.split(":") for entry in _TABLE[group].split())
    return {entry[0]: int(entry[_COLUMN[machine]]) for entry in entries if entry[_COLUMN[machine]] != "-"}
