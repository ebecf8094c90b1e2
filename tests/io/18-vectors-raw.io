$ create -q -f raw disk 4M
@ -f raw disk
writev -P 6 1000 100 200 300
readv -P 6 1000 300 200 100
read -P 0 1600 400
writev -q 0 512 512
readv -q 0 512 512
