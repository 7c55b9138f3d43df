# One command: standard output to the second serial port, standard error to the third. What
# follows the output, a line with the nonce and the exit code, tells the monitor how it ended.
stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
cd /root
sh /command </dev/null >/dev/ttyS1 2>/dev/ttyS2
code=$?
printf '\n%s %d\n' "$(cat /nonce)" "$code" >/dev/ttyS1
# Output that is still on its way is drained when the port is closed for the last time.
